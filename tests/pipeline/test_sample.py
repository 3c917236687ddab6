import contextlib
import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from lipprep.pipeline import pool, sample
from lipprep.pipeline.sample import WORDS, make_sample, word_track, write_clip
from lipprep.pipeline.sources import lrw, lrw_duration
from lipprep.pipeline.talker import LOOKS, VISEMES, mouth_points, portrait, speak
from lipprep.stages.landmarks import load_detector, track
from lipprep.stages.video import probe, read_frames


def digests(folder: Path) -> dict[str, str]:
    return {
        p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


FEW = ("ABOUT", "VOICE", "WOMEN")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A corpus of a few of the words."""
    folder = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "WORDS", {word: WORDS[word] for word in FEW})
        patch.setattr(sample, "MIN_CLIPS", 9)
        assert make_sample(folder, clips=9, seed=1, workers=2) == 9
    return folder


@pytest.mark.parametrize("clips", [30, 47])
def test_every_split_has_every_word(clips, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(pool, "pool", lambda workers: contextlib.nullcontext())
    monkeypatch.setattr(pool, "run_all", lambda _, write, jobs, *, ahead: written.extend(jobs) or ())
    assert make_sample(tmp_path, clips=clips) == clips == len(set(written))
    assert {(word, split) for word, split, _ in written} == {(w, s) for w in WORDS for s in ("train", "val", "test")}


def test_the_corpus_is_lrw_shaped(corpus):
    rows = list(lrw(corpus))
    assert {(r.word, r.split) for r in rows} == {(w, s) for w in FEW for s in ("train", "val", "test")}
    for row in rows:
        assert 0.3 <= row.duration <= 0.65
        info = probe(corpus / row.video)
        assert (info.width, info.height, info.fps, info.num_frames) == (256, 256, 25.0, 29)
    text = (corpus / rows[0].video).with_suffix(".txt").read_text()
    assert len(text.split("\n")) == 5 and all(line.endswith(" ") for line in text.split("\n"))
    assert lrw_duration(text) == rows[0].duration


def test_a_clip_depends_on_its_name_and_the_seed_alone(corpus, tmp_path):
    write_clip(tmp_path, 1, "VOICE", "val", 1)
    assert digests(tmp_path).items() <= digests(corpus).items()
    other = tmp_path / "other"
    write_clip(other, 2, "VOICE", "val", 1)
    assert not digests(other).items() & digests(corpus).items()


def test_too_few_clips_are_refused(tmp_path):
    with pytest.raises(ValueError, match="30 give every split"):
        make_sample(tmp_path, clips=29)


def test_another_corpus_in_the_folder_is_refused(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/holiday.mp4").touch()
    with pytest.raises(ValueError, match=r"holiday\.mp4"):
        make_sample(tmp_path, clips=30)


def test_words_differ_in_their_tracks_and_one_word_varies():
    tracks = {w: [word_track(w, 0.5, np.random.default_rng(n)) for n in range(4)] for w in WORDS}
    middle = slice(8, 21)
    for word, mine in tracks.items():
        centre = np.mean(mine, 0)[middle]
        assert np.abs(mine[0] - mine[1]).max() > 0.02
        for other, theirs in tracks.items():
            if other != word:
                assert np.abs(centre - np.mean(theirs, 0)[middle]).mean() > 0.05, (word, other)


def test_the_detector_finds_every_face_and_follows_the_mouth(corpus):
    detector = load_detector("mesh")
    openings, shown = [], []
    for video in [next(corpus.glob("ABOUT/test/*.mp4")), next(corpus.glob("WOMEN/train/*.mp4"))]:
        found = track(read_frames(video), detector)
        assert np.isfinite(found.points).all() and found.max_faces == 1
    look = 2
    for opening in np.linspace(0, 1, 6):
        shape = np.array([opening, 0, 0, 0, 0])
        gray = cv2.cvtColor(np.clip(speak(look, shape), 0, 255).astype(np.uint8), cv2.COLOR_RGB2GRAY)
        points = track([gray] * 2, detector).points[-1]
        shown.append(np.linalg.norm(points[66] - points[62]))
        openings.append(opening)
    assert np.corrcoef(openings, shown)[0, 1] > 0.9


@pytest.mark.parametrize("look", range(len(LOOKS)))
def test_every_shape_keeps_lips_in_order(look):
    still = portrait(look)
    for shape in VISEMES.values():
        moved = mouth_points(still.points, np.array(shape), still.lips)
        tucked = 3 * shape[4]  # under the upper teeth
        assert moved[51, 1] < moved[62, 1] <= moved[66, 1] + 0.5 + tucked < moved[57, 1] + tucked
        assert moved[48, 0] < moved[60, 0] < moved[62, 0] < moved[64, 0] < moved[54, 0]
