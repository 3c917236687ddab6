import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pyarrow import parquet
from traps import PATIENCE

from lipprep.cli import main
from lipprep.stages.crop import Window, crop_clips
from lipprep.stages.failures import ClipFailure
from lipprep.stages.landmarks import track
from lipprep.stages.shard.index import load_index
from lipprep.stages.shard.reader import read_samples
from lipprep.stages.video import read_frames
from lipprep.train import embed_files
from lipprep.train.augment import eval_batch
from lipprep.train.checkpoint import load_checkpoint, save_checkpoint
from lipprep.train.draws import AugmentOptions
from lipprep.train.embed import Embedder, crops_of_video, embed_shards, embed_videos
from lipprep.train.models import build
from lipprep.train.predict import load_reader
from lipprep.train.videos import keyed_videos

C = 128  # features of the trained run's network
CPU = torch.device("cpu")


def call(*args, code: int = 0):
    result = CliRunner().invoke(main, ["embed", *map(str, args), "--device", "cpu"])
    assert result.exit_code == code, result.output
    return result


def one_pass(mouth: np.ndarray, model: torch.nn.Module, options: AugmentOptions) -> np.ndarray:
    """The features of one clip by itself, as a training loop would ask for them."""
    lengths = torch.tensor([len(mouth)])
    with torch.inference_mode():
        x = eval_batch(torch.from_numpy(mouth.copy())[None], lengths, options)
        return model.extract_features(x, lengths)[0].numpy()


def samples(shards: Path, split: str = "test") -> list[dict]:
    index = load_index(shards)
    read = [
        read_samples(shards / s.name, index.offsets[s.name], range(position, position + 1))
        for s in index.split(split)
        for position in range(s.samples)
    ]
    return [sample for (sample,) in read]


@pytest.fixture(scope="module")
def reader(trained_run):
    return load_reader(trained_run, device="cpu")


@pytest.fixture(scope="module")
def film(make_video, face_frames, tmp_path_factory) -> Path:
    """A face for 34 frames."""
    frames = [face_frames[t % 29] for t in range(34)]
    return make_video(tmp_path_factory.mktemp("films") / "me" / "film.mp4", frames)


@pytest.fixture
def other_run(trained_run, tmp_path):
    """The trained run's checkpoint with a field changed."""

    def changed(**fields):
        save_checkpoint(tmp_path / "other.pt", dataclasses.replace(load_checkpoint(trained_run / "best.pt"), **fields))
        return tmp_path / "other.pt"

    return changed


@pytest.mark.parametrize("trunk", ["compact", "resnet18"])
@pytest.mark.parametrize("mean_frame", [False, True])
def test_batches_and_stretches_have_the_features_of_one_pass_over_each_clip(trunk, mean_frame):
    torch.manual_seed(0)
    head = {"name": "tcn", "channels": 8, "num_layers": 1}
    model = build({"trunk": trunk, "activation": "relu", "head": head}, 4).eval()
    options = AugmentOptions(crop_size=48, subtract_mean_frame=mean_frame)
    random = np.random.default_rng(0)
    # each clip of another brightness, so that what leaks from one to another shows
    clips = [
        random.integers(low, low + 90, (T, 52, 52), np.uint8)
        for T, low in [(3, 0), (20, 160), (3, 90), (1, 20), (8, 50)]
    ]
    alone = [one_pass(clip, model, options) for clip in clips]
    for at_once in (7, 64):  # a clip of 20 is read in three stretches, or with others
        together = Embedder(model, options, CPU, "fp32", at_once).read(clips)
        for ours, theirs in zip(together, alone, strict=True):
            assert ours.shape == theirs.shape and ours.dtype == np.float32
            assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_folder_has_what_the_network_makes_of_each_clip(shards, trained_run, reader, tmp_path):
    told = json.loads(call(shards, "--checkpoint", trained_run, "-o", tmp_path / "f", "--json").stdout)
    assert (told["clips"], told["failed"], told["channels"], told["recipe"]) == (72, 0, C, "compact")
    assert told["files"] == [str(tmp_path / "f" / "embedding.json")]
    assert len(list((tmp_path / "f").rglob("*.npz"))) == 72
    for sample in samples(shards):
        with np.load(tmp_path / "f" / f"{sample['key']}.npz", allow_pickle=False) as arrays:
            expected = one_pass(sample["mouth"], reader.model, reader.options)
            assert arrays["data"].dtype == np.float32
            assert arrays["data"] == pytest.approx(expected, abs=1e-5)
            known = {name: arrays[name].item() for name in ("word", "label", "split", "fps")}
        assert known == {"word": sample["word"], "label": sample["label"], "split": "test", "fps": 25.0}


def test_a_table_has_the_same_and_says_what_it_was_made_with(shards, trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_files, "_ROW_GROUP", 5 * 8 * C * 2)  # five clips or so
    how = ("--checkpoint", trained_run, "--split", "test", "--split", "val", "--dtype", "float16")
    call(shards, *how, "-o", tmp_path / "f")
    told = json.loads(call(shards, *how, "-o", tmp_path / "t.parquet", "--json").stdout)
    assert told["files"] == [str(tmp_path / "t.parquet")] and told["clips"] == 24
    with parquet.ParquetFile(tmp_path / "t.parquet") as file:
        assert file.num_row_groups > 2
        table = file.read()
    rows = table.to_pylist()
    assert [row["key"] for row in rows] == [s["key"] for split in ("test", "val") for s in samples(shards, split)]
    for row in rows:
        with np.load(tmp_path / "f" / f"{row['key']}.npz", allow_pickle=False) as arrays:
            assert arrays["data"].dtype == np.float16
            assert np.array_equal(np.array(row["features"], np.float16), arrays["data"])
            assert row["num_frames"] == len(arrays["data"])
            assert (row["split"], row["word"], row["label"]) == tuple(
                arrays[n].item() for n in ("split", "word", "label")
            )
    metadata = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    about = json.loads((tmp_path / "f" / "embedding.json").read_text())
    assert metadata["recipe"] == "compact" and metadata["profile"] == "lrw2021"
    assert metadata["checkpoint_sha256"] == about["checkpoint_sha256"]
    assert json.loads(metadata["step"]) == about["step"] == load_checkpoint(trained_run / "best.pt").step
    assert json.loads(metadata["labels"]) == about["labels"] == ["down", "grow", "shrink", "up"]
    assert "--replace" in call(shards, *how, "-o", tmp_path / "t.parquet", code=1).output
    call(shards, *how, "-o", tmp_path / "t.parquet", "--replace")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f", "t.parquet"]


@pytest.mark.parametrize("exact", [False, True])
def test_a_long_video_in_stretches_has_the_features_of_one_pass(film, other_run, trained_run, exact, tmp_path):
    run = other_run(parameters=load_checkpoint(trained_run / "best.pt").parameters | {"exact": exact})
    reader = load_reader(run, device="cpu")
    told = embed_videos(run, {"film": film}, out=tmp_path / "f", device="cpu", batch_size=1)  # 29 frames at once
    assert (told["clips"], told["frames"]) == (1, 34)
    points = track(read_frames(film), reader.detector).points
    (crop,) = crop_clips(read_frames(film, color=exact), [Window(None, None, points)], reader.crop)
    with np.load(tmp_path / "f" / "film.npz", allow_pickle=False) as arrays:
        assert arrays["data"] == pytest.approx(one_pass(crop.mouth, reader.model, reader.options), abs=1e-5)
        assert sorted(arrays) == ["data", "fps", "made_from"]  # what nobody knows is not there


def test_videos_are_called_by_their_paths_below_the_folder(film, trained_run, reader, make_video, tmp_path):
    folder = tmp_path / "videos"
    make_video(folder / "a" / "noise.mp4", [np.full((64, 64, 3), 90, np.uint8)] * 5)
    (folder / "text.mkv").write_text("no video")
    shutil.copytree(film.parent, folder / "me")
    how = ("--checkpoint", trained_run, "-o", tmp_path / "t.parquet", "--json")
    told = json.loads(call(folder, *how, code=1).stdout)
    assert (told["clips"], told["failed"]) == (1, 2)
    assert told["files"] == [str(tmp_path / "t.parquet"), str(tmp_path / "t.failures.jsonl")]
    (row,) = parquet.read_table(tmp_path / "t.parquet").to_pylist()
    assert (row["key"], row["num_frames"], row["word"]) == ("me/film", 34, None)
    lines = [json.loads(line) for line in (tmp_path / "t.failures.jsonl").read_text().splitlines()]
    assert [(line["key"], line["class"]) for line in lines] == [("a/noise", "no_face"), ("text", "unreadable")]
    (folder / "text.mp4").touch()
    with pytest.raises(ValueError, match="both be called text"):
        keyed_videos([folder])


def test_videos_without_landmarks_and_of_stores_are_read_too(film, other_run, trained_run, bucket, tmp_path):
    fixed = {"profile": "fixed", "box": [80, 116, 96, 96]}
    run = other_run(parameters=load_checkpoint(trained_run / "best.pt").parameters | fixed)
    (bucket / "r/film.mp4").upload(film)
    call(film, "--checkpoint", run, "-o", tmp_path / "disk")
    call(bucket / "r", "--checkpoint", run, "-o", tmp_path / "store")
    with np.load(tmp_path / "disk/film.npz") as disk, np.load(tmp_path / "store/film.npz") as store:
        assert disk["data"].shape == (34, C)
        assert np.array_equal(disk["data"], store["data"])


def test_what_is_there_is_kept_and_what_is_damaged_or_missing_made_again(shards, trained_run, tmp_path):
    how = {"out": tmp_path, "splits": ["test"], "device": "cpu"}
    embed_shards(trained_run, shards, **how)
    paths = sorted(tmp_path.rglob("*.npz"))
    content = [path.read_bytes() for path in paths]
    times = [path.stat().st_mtime_ns for path in paths]
    paths[0].unlink()
    paths[1].write_bytes(content[1][:-40])
    paths[2].write_bytes(content[2].replace(b"t\0\0\0e\0\0\0s\0\0\0t\0\0\0", b"t\0\0\0e\0\0\0s\0\0\0_\0\0\0"))
    assert len({path.read_bytes() == before for path, before in zip(paths[1:], content[1:], strict=True)}) == 2
    told = embed_shards(trained_run, shards, **how)
    assert (told["clips"], told["present"]) == (3, 11)
    with np.load(paths[0]) as arrays:
        assert arrays["split"] == "test"
    assert [path.stat().st_mtime_ns for path in paths[3:]] == times[3:]
    assert embed_shards(trained_run, shards, **{**how, "splits": ["test", "val"]})["clips"] == 10


def test_a_clip_whose_name_no_file_can_have_fails_alone(other_run, trained_run, make_shards, make_video, tmp_path):
    fixed = {"profile": "fixed", "box": [0, 0, 96, 96]}
    run = other_run(parameters=load_checkpoint(trained_run / "best.pt").parameters | fixed)
    video = make_video(tmp_path / "v.mp4", [np.full((96, 96, 3), 90, np.uint8)] * 2)
    longest = "x" * 251  # 255 with .npz, the most that a name may have
    videos = dict.fromkeys([longest, longest + "x", "a", "a.npz/b", "c.npz/d", "c", "z"], video)
    told = embed_videos(run, videos, out=tmp_path / "f", device="cpu")
    assert (told["clips"], told["failed"]) == (4, 3)
    lines = [json.loads(line) for line in (tmp_path / "f" / "failures.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == [longest + "x", "a.npz/b", "c"]
    assert {line["class"] for line in lines} == {"unsafe_member"} and lines[0]["video"] == str(video)
    assert not list(tmp_path.rglob("*.tmp"))

    shards = make_shards(tmp_path / "s", splits={"test": [3]}, words=("y" * 249, "b"))
    told = embed_shards(trained_run, shards, out=tmp_path / "g", device="cpu")
    assert (told["clips"], told["failed"]) == (1, 2)
    assert "too long" in (tmp_path / "g" / "failures.jsonl").read_text()


def test_a_table_of_failures_alone_replaces_an_older_one(trained_run, film, tmp_path):
    (tmp_path / "v.mp4").write_text("no video")
    call(film, "--checkpoint", trained_run, "-o", tmp_path / "t.parquet")
    call(tmp_path / "v.mp4", "--checkpoint", trained_run, "-o", tmp_path / "t.parquet", "--replace", code=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.failures.jsonl", "v.mp4"]


def test_a_video_that_changed_is_made_again(face_frames, make_video, trained_run, tmp_path):
    videos = {"v": make_video(tmp_path / "v.mp4", face_frames[:4])}
    how = {"out": tmp_path / "f", "device": "cpu"}
    assert embed_videos(trained_run, videos, **how)["clips"] == 1
    assert embed_videos(trained_run, videos, **how)["present"] == 1
    make_video(tmp_path / "v.mp4", face_frames[:6])
    assert embed_videos(trained_run, videos, **how)["frames"] == 6


def test_features_of_another_checkpoint_are_not_mixed_with_these(shards, trained_run, other_run, tmp_path):
    out = tmp_path / "f"
    embed_shards(trained_run, shards, out=out, splits=["test", "val"], device="cpu")
    again = (shards, "--checkpoint", other_run(step=7), "-o", out, "--split", "val")
    assert "(see checkpoint_sha256, step in" in call(*again, code=1).output
    half = (shards, "--checkpoint", trained_run, "-o", out, "--dtype", "float16")
    assert "(see dtype in embedding.json there)" in call(*half, code=1).output
    np.savez(out / "mine.npz", data=np.zeros(3))
    call(*again, "--replace")
    left = {path.stem for path in out.rglob("*.npz")}
    assert left == {"mine", *(sample["key"].rpartition("/")[2] for sample in samples(shards, "val"))}
    (out / "embedding.json").unlink()
    assert "holds files of another kind" in call(*again, "--replace", code=1).output


def test_a_killed_run_leaves_whole_files_alone_and_is_gone_on_with(shards, trained_run, python, tmp_path):
    code = (
        "import os, signal, sys\nfrom lipprep.train import embed_files\nfrom lipprep.cli import main\n"
        "savez, count = embed_files.np.savez, 0\n"
        "def dying(file, **arrays):\n"
        "    global count\n    count += 1\n    savez(file, **arrays)\n    file.flush()\n"
        "    count < 4 or os.kill(os.getpid(), signal.SIGKILL)\n"
        "embed_files.np.savez = dying\nmain(sys.argv[1:])"
    )
    args = ["embed", shards, "--checkpoint", trained_run, "-o", tmp_path, "--split", "test", "--device", "cpu"]
    process = python(code, args, env=os.environ)
    _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == -signal.SIGKILL, err
    assert len(list(tmp_path.rglob(".*.npz.*.tmp"))) == 1
    told = embed_shards(trained_run, shards, out=tmp_path, splits=["test"], device="cpu")
    assert (told["clips"], told["present"]) == (11, 3)
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_table_that_is_stopped_leaves_nothing(shards, trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr(embed_files, "_ROW_GROUP", 1)
    flush = embed_files.FeatureTable.flush

    def pressed(table):
        flush(table)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(embed_files.FeatureTable, "flush", pressed)
    words = call(shards, "--checkpoint", trained_run, "-o", tmp_path / "t.parquet", code=130).output
    assert "nothing of it is kept" in words
    assert not list(tmp_path.iterdir())


def test_clips_that_fail_are_told_and_listed_and_the_others_made(make_shards, trained_run, tmp_path):
    shards = make_shards(tmp_path / "s", splits={"test": [6]}, words=("../a", "b"))
    tar, starts = shards / "test-0000.tar", load_index(shards).offsets["test-0000.tar"]
    content = bytearray(tar.read_bytes())
    content[starts[1] + 512 : starts[1] + 520] = b"no array"
    tar.write_bytes(content)
    args = (shards, "--checkpoint", trained_run, "-o", tmp_path / "f", "--json")
    result = call(*args, code=1)
    told = json.loads(result.stdout)
    assert (told["clips"], told["failed"]) == (2, 4)
    assert "test-0000.tar" in result.stderr
    lines = [json.loads(line) for line in (tmp_path / "f" / "failures.jsonl").read_text().splitlines()]
    assert [(line["position"], line["class"]) for line in lines] == [
        (0, "unsafe_member"),
        (1, "damaged_clip"),
        (2, "unsafe_member"),
        (4, "unsafe_member"),
    ]
    assert len(list(tmp_path.rglob("*.npz"))) == 2 + 1  # the clips, and the index
    assert json.loads(call(*args, code=1).stdout)["present"] == 2


def test_other_words_have_features_but_other_crops_do_not(make_shards, trained_run, tmp_path):
    other = make_shards(tmp_path / "words", splits={"test": [2]}, words=("yes", "no"))
    embed_shards(trained_run, other, out=tmp_path / "f", device="cpu")
    with np.load(tmp_path / "f" / "yes/test/yes_00000.npz") as arrays:
        assert arrays["word"] == "yes" and arrays["label"] == 0
    other = make_shards(tmp_path / "profile", splits={"test": [2]}, profile="lrw2022")
    with pytest.raises(ValueError, match="profile lrw2021"):
        embed_shards(trained_run, other, out=tmp_path / "g", device="cpu")


def test_features_that_float16_cannot_hold_are_refused(tmp_path):
    about = {"channels": 2, "dtype": "float16", "fps": 25.0}
    with (
        embed_files.open_features(tmp_path, about, replace=False) as folder,
        pytest.raises(ValueError, match="float32"),
    ):
        folder.add(embed_files.ClipFeatures("a", np.full((1, 2), 1e6, np.float32), ""))


def test_bad_input_ends_in_one_line(shards, trained_run, film, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "d.parquet").mkdir()
    out = ("-o", tmp_path / "f")
    for args, message in [
        ((shards, "--checkpoint", shards / "train-0000.tar", *out), "damaged"),
        ((shards, "--checkpoint", tmp_path, *out), "neither best.pt nor last.pt"),
        ((shards, "--checkpoint", trained_run, *out, "--split", "x"), "(they hold: test, train, val)"),
        ((film, "--checkpoint", trained_run, *out, "--split", "test"), "--split is of shards"),
        ((film, shards, "--checkpoint", trained_run, *out), "name it alone"),
        ((tmp_path, "--checkpoint", trained_run, *out), "no videos"),
        ((shards, "--checkpoint", trained_run, "-o", tmp_path / "file"), "is a file: name a folder"),
        ((shards, "--checkpoint", trained_run, "-o", tmp_path / "f.csv"), "nor a FILE.parquet"),
        ((shards, "--checkpoint", trained_run, "-o", tmp_path / "d.parquet"), "is a folder"),
        ((shards, "--checkpoint", trained_run, "-o", "s3://bucket/f"), "name a local folder"),
    ]:
        result = call(*args, code=1)
        assert message in result.output
        assert result.output.startswith("Error: ") and "Traceback" not in result.output
    assert not (tmp_path / "f").exists()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    words = call(shards, "--checkpoint", trained_run, "-o", tmp_path / "t.parquet", code=1).output
    assert 'pip install "lipprep[parquet]"' in words


def test_two_processes_do_not_write_to_one_folder(shards, trained_run, tmp_path, monkeypatch):
    monkeypatch.setattr("lipprep.stages.lock._PATIENCE", 0)
    about = {"channels": 2, "dtype": "float32", "fps": 25.0}
    with (
        embed_files.open_features(tmp_path, about, replace=False),
        pytest.raises(ValueError, match="another process writes to"),
    ):
        embed_shards(trained_run, shards, out=tmp_path, device="cpu")


def test_a_video_that_ends_early_is_no_clip(reader, film, tmp_path):
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(film.read_bytes()[: film.stat().st_size // 2])
    with pytest.raises(ClipFailure):
        crops_of_video(reader, cut, length=29)
