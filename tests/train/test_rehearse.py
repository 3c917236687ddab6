import pytest

from lipprep.train.config import load_recipe
from lipprep.train.rehearse import rehearse, told
from lipprep.train.timing import PARTS


def test_a_rehearsal_times_each_part_and_leaves_nothing(shards, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rehearsal = rehearse(load_recipe("compact", [*tiny, "epochs=3"]), shards=shards, device="cpu")
    assert set(rehearsal.parts) == set(PARTS)
    assert rehearsal.step_seconds == pytest.approx(sum(rehearsal.parts.values()))
    assert rehearsal.steps == 18 and rehearsal.run_seconds == pytest.approx(3 * rehearsal.epoch_seconds)
    assert rehearsal.batch[0] == 8 and rehearsal.batch[2:] == [72, 72]
    assert rehearsal.peak_memory > 1e6 and rehearsal.checkpoint_bytes > 1e5
    assert not list(tmp_path.iterdir())
    assert any("clips/s" in line for line in told(rehearsal))
