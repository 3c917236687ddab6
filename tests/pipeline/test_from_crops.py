"""Mouth crops that exist already: packed as those that are cut, with the same accounts."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from traps import POSIX, entries, tars

from lipprep.pipeline import make
from lipprep.pipeline.manifest import load_manifest
from lipprep.stages.lock import LOCK
from lipprep.stages.shard.index import load_index
from lipprep.stages.shard.reader import read_samples

WORDS = ("ABOUT", "BLACK")
SPLITS = ("train",) * 4 + ("val", "test")


def clip(seed: int, size: int = 16) -> np.ndarray:
    """Six frames in colour of a picture that moves, (6, size, size, 3) uint8."""
    picture = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    picture = cv2.resize(picture, (size + 6, size), interpolation=cv2.INTER_CUBIC)
    return np.stack([picture[:, t : t + size] for t in range(6)])


def gray(colour: np.ndarray) -> np.ndarray:
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in colour])


def save(path: Path, crops: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, data=crops) if path.suffix == ".npz" else np.save(path, crops)
    return path


@pytest.fixture
def crops(lipprep, tmp_path) -> Path:
    """Two words, six clips each, gray; with durations beside them."""
    for n, word in enumerate(WORDS):
        for k, split in enumerate(SPLITS):
            path = save(tmp_path / f"mouths/{word}/{split}/{word}_{k:05d}.npz", gray(clip(10 * n + k)))
            path.with_suffix(".txt").write_text(f"Channel: none \nDuration: 0.{20 + k} seconds ")
    return Path("mouths")


@pytest.fixture
def pack(lipprep):
    """Pack crops in this process; give the command's figures."""

    def run(*arguments: object, code: int = 0) -> dict:
        arguments = ("--engine", "serial", "--json", "--max-failures", "100%", *arguments)
        result = lipprep("shards", *arguments, code=code)
        return json.loads(result.stdout.splitlines()[-1])

    return run


def samples(folder: Path = Path("shards")) -> dict[str, dict]:
    index = load_index(folder)
    read = [read_samples(folder / s.name, index.offsets[s.name], range(s.samples)) for s in index.shards]
    return {sample["key"]: sample for some in read for sample in some}


def test_published_crops_come_through_to_the_pixel(lipprep, pack, golden, tmp_path):
    for profile, source in (("lrw2021", "legacy_gray"), ("lrw2022", "new_gray")):
        files = sorted((golden / "crops" / source).rglob("*.npz"))
        for path in files:
            with np.load(path) as arrays:
                save(tmp_path / source / path.relative_to(golden / "crops" / source), arrays["data"])
        figures = pack("--from-crops", source, "--profile", profile, "--codec", "npy", "-o", profile)
        assert figures["planned"] == figures["ok"] == len(files) == 4
        found = samples(Path(profile))
        for path in files:
            key = path.relative_to(golden / "crops" / source).with_suffix("").as_posix()
            with np.load(path) as arrays:
                assert np.array_equal(found[key]["mouth"], arrays["data"])
        index = load_index(Path(profile))
        assert (index.profile, index.crop_size, index.dataset) == (profile, 96, source)
        assert index.parameters["crops_from"] == "files" and "detector" not in index.parameters
        assert "sound" in lipprep("verify", profile).stdout


def test_colour_of_either_version_gives_the_same_gray(pack, tmp_path):
    for n in range(8):
        save(tmp_path / f"old/ABOUT/train/{n}.npz", clip(n)[..., ::-1])
        save(tmp_path / f"new/ABOUT/train/{n}.npy", clip(n))
        save(tmp_path / f"plain/ABOUT/train/{n}.npz", gray(clip(n)))
    sets = {"old": "lrw2021", "new": "lrw2022", "plain": "unaligned"}
    for name, profile in sets.items():
        pack("--from-crops", name, "--profile", profile, "--codec", "npy", "-o", f"{name}-shards")
    old, new, plain = (samples(Path(f"{name}-shards")) for name in sets)
    assert set(old) == set(new) == set(plain) and len(old) == 8
    for key in old:
        assert np.array_equal(old[key]["mouth"], new[key]["mouth"])
        assert np.array_equal(old[key]["mouth"], plain[key]["mouth"])


def test_a_set_of_crops_is_as_good_as_one_of_videos(crops, pack, lipprep):
    figures = pack("--from-crops", crops, "--profile", "lrw2021")
    assert figures["planned"] == figures["ok"] == figures["clips_computed"] == 12
    listed = load_manifest(Path("manifests/mouths.jsonl"))
    assert listed.labels == WORDS and Counter(c.split for c in listed.clips) == {"train": 8, "val": 2, "test": 2}
    sample = samples()["BLACK/train/BLACK_00003"]
    assert (sample["word"], sample["label"], sample["split"], sample["duration"]) == ("BLACK", 1, "train", 0.23)
    assert sample["mouth"].shape == (6, 16, 16) and load_index(Path("shards")).crop_size == 16
    figures = entries("shards")["BLACK/train/BLACK_00003"]["figures"]
    assert figures["num_frames"] == 6 and figures["brightness"] == pytest.approx(gray(clip(13)).mean(), abs=0.01)
    rows = json.loads(lipprep("status", "--json").stdout)
    assert [(row["stage"], row["fresh"], row["clips"]) for row in rows] == [("shards", 12, {"ok": 12})]
    assert json.loads(lipprep("manifest", "check", "--json").stdout) == {"videos": 12, "problems": []}
    files = [p for p in Path().rglob("*") if p.is_file() and p.name not in ("report.json", LOCK)]
    before = [p.stat().st_mtime_ns for p in files]
    for again in ((), ("--from-crops", crops)):  # what was said once is known
        assert pack(*again)["chunks_made"] == 0
    assert [p.stat().st_mtime_ns for p in files] == before


def test_the_bytes_do_not_depend_on_who_made_them(crops, pack, lipprep):
    pack("--from-crops", crops, "--profile", "lrw2021")
    one, index = tars("shards"), Path("shards/index.json").read_bytes()
    shutil.rmtree("shards")
    lipprep("shards", "-j", 2)
    assert tars("shards") == one and Path("shards/index.json").read_bytes() == index
    for folder in ("shards", "work", "manifests"):
        shutil.rmtree(folder)
    for part in ("1/2", "2/2"):
        lipprep("shards", "--from-crops", crops, "--profile", "lrw2021", "--slice", part, "--engine", "serial")
    lipprep("index")
    assert tars("shards") == one and Path("shards/index.json").read_bytes() == index


def test_rubbish_costs_its_clips_alone(crops, pack, lipprep):
    pack("--from-crops", crops, "--profile", "lrw2021")
    whole = tars("shards")
    bad = {
        "floats": (lambda path: save(path, gray(clip(1)) / 255), "bad_crops"),
        "flat": (lambda path: save(path, gray(clip(1))[0]), "bad_crops"),
        "pickle": (lambda path: save(path, np.array([None, {}], object)), "bad_crops"),
        "other": (lambda path: np.savez(path, mouth=gray(clip(1))), "bad_crops"),
        "small": (lambda path: save(path, gray(clip(1, 24))), "bad_crops"),
        "cut": (lambda path: path.write_bytes(path.read_bytes()[:100]), "unreadable"),
        "empty": (lambda path: path.write_bytes(b""), "unreadable"),
        "still": (lambda path: save(path, gray(clip(1))[:0]), "too_short"),
    }
    paths = dict(zip(bad, sorted(crops.rglob("*.npz")), strict=False))
    sound = {path: path.read_bytes() for path in paths.values()}
    for name, (spoil, _) in bad.items():
        spoil(paths[name])
    figures = pack()
    assert (figures["planned"], figures["ok"], figures["clips_computed"]) == (12, 4, 8)
    assert figures["failed"] == dict(Counter(kind for _, kind in bad.values()).most_common())
    found = {f["video"]: f for f in json.loads(lipprep("failures", "--json").stdout)}
    for name, (_, kind) in bad.items():
        failure = found[paths[name].relative_to(crops).as_posix()]
        assert (failure["class"], failure["stage"]) == (kind, "shards") and paths[name].name in failure["message"]
    assert "--crop-size 24" in found[paths["small"].relative_to(crops).as_posix()]["message"]
    assert pack()["chunks_made"] == 0 and "sound" in lipprep("verify", "--deep", "-j", 1).stdout
    for path, content in sound.items():
        path.write_bytes(content)
    assert pack()["clips_computed"] == 8 and tars("shards") == whole


def test_an_interrupted_run_goes_on_where_it_was(crops, pack, lipprep, monkeypatch):
    lipprep("shards", "--from-crops", crops, "--profile", "lrw2021", "--engine", "serial")
    whole, plain, read = tars("shards"), make.read_crops, []
    shutil.rmtree("shards")

    def interrupted(path, **how):
        if len(read) == 5:
            raise KeyboardInterrupt
        read.append(path)
        return plain(path, **how)

    monkeypatch.setattr(make, "read_crops", interrupted)
    lipprep("shards", "--engine", "serial", code=130)
    monkeypatch.setattr(make, "read_crops", lambda path, **how: read.append(path) or plain(path, **how))
    lipprep("shards", "--engine", "serial")
    assert len(read) == len(set(read)) == 12 and tars("shards") == whole


@POSIX
def test_a_file_that_kills_its_process_is_found(crops, pack, trapped):
    pack("--from-crops", crops, "--profile", "lrw2021")
    shutil.rmtree("shards")
    guilty = "ABOUT/train/ABOUT_00002"
    done = trapped("shards", "-j", 1, "--json", "--max-failures", 1, traps={guilty: "kill"})
    assert json.loads(done.stdout)["failed"] == {"crashed": 1} and entries("shards")[guilty]["class"] == "crashed"


def test_durations_may_lie_apart_and_labels_be_given(crops, pack, lipprep, tmp_path):
    for text in list(crops.rglob("*.txt")):
        target = tmp_path / "videos" / text.relative_to(crops)
        target.parent.mkdir(parents=True, exist_ok=True)
        text.rename(target)
    (tmp_path / "words.txt").write_text("BLACK\nABOUT\nCHINA\n")
    listing = ("--annotations", "videos", "--labels", "words.txt")
    pack("--from-crops", crops, "--profile", "lrw2022", *listing)
    assert samples()["ABOUT/val/ABOUT_00004"]["duration"] == 0.24
    assert load_index(Path("shards")).labels == ("BLACK", "ABOUT", "CHINA")
    # A clip more: where the others' durations and labels are is known; they are copied.
    save(crops / "CHINA/train/CHINA_00001.npz", gray(clip(77)))
    figures = pack("--from-crops", crops)
    assert (figures["ok"], figures["clips_computed"]) == (13, 1)
    assert samples()["CHINA/train/CHINA_00001"]["label"] == 2
    assert samples()["ABOUT/val/ABOUT_00004"]["duration"] == 0.24
    assert load_index(Path("shards")).profile == "lrw2022"
    # A corrected duration is read where crops are listed again, and computes nothing.
    (tmp_path / "videos/ABOUT/val/ABOUT_00004.txt").write_text("Duration: 0.5 seconds")
    assert pack("--from-crops", crops)["clips_computed"] == 0
    assert samples()["ABOUT/val/ABOUT_00004"]["duration"] == 0.5


def test_the_commonest_size_is_the_sets(crops, pack):
    for n in range(5):
        save(crops / f"BLACK/train/small_{n}.npz", gray(clip(n, 8)))
    figures = pack("--from-crops", crops, "--profile", "lrw2021")
    assert figures["ok"] == 12 and figures["failed"] == {"bad_crops": 5}
    figures = pack("--from-crops", crops, "--profile", "lrw2021", "--crop-size", 8, "-m", "small.jsonl", "-o", "small")
    assert figures["ok"] == 5 and figures["failed"] == {"bad_crops": 12}
    assert load_index(Path("small")).crop_size == 8 and load_index(Path("shards")).crop_size == 16


def test_videos_beside_the_crops_are_left_alone(crops, lipprep):
    for path in list(crops.rglob("*.npz")):
        path.with_suffix(".mp4").write_bytes(b"a video")
    result = lipprep("shards", "--from-crops", crops, "--profile", "lrw2021", "--engine", "serial", "--json")
    assert json.loads(result.stdout)["planned"] == 12 and "12 videos below mouths are left alone" in result.stderr
    for path in crops.rglob("*.npz"):
        path.unlink()
    said = lipprep("shards", "--from-crops", crops, code=1).stderr
    assert "there are no mouth crops" in said and "lipprep manifest lrw mouths" in said


def landmarks(folder: Path) -> None:
    for path in folder.rglob("*.npz"):
        save(path, np.array([{"facial_landmarks": np.zeros((68, 2))}] * 6, object))


def in_colour(folder: Path) -> None:
    for path in folder.rglob("*.npz"):
        save(path, clip(1))


def of_another_size(size: int):
    return lambda folder: [save(path, gray(clip(1, size))) for path in folder.rglob("*.npz")]


def named_alike(folder: Path) -> None:
    save(folder / "ABOUT/train/ABOUT_00000.npy", gray(clip(1)))


PROFILED = ("--from-crops", "mouths", "--profile", "lrw2021")


@pytest.mark.parametrize(
    ("spoil", "arguments", "message"),
    [
        (None, PROFILED[:2], "say how these crops were aligned, e.g. --profile lrw2021"),
        (None, (*PROFILED[:3], "lrw2023"), "'lrw2023' is not one of 'lrw2021', 'lrw2022'"),
        (None, ("--from-crops", "absent", *PROFILED[2:]), "there is no folder absent of mouth crops"),
        (None, ("--from-crops", "mouths/ABOUT", *PROFILED[2:]), r"no mouth crops WORD/\{train,val,test\}/NAME.npz"),
        (None, (*PROFILED, "--exact"), "--exact and --luma say how crops are cut"),
        (None, (*PROFILED, "--luma"), "leave them out"),
        (None, (*PROFILED, "--box", "0,0,16,16"), "--box is for --profile fixed"),
        (None, (*PROFILED[:3], "fixed", "--box", "0,0,16"), "not of the form X,Y,W,H"),
        (None, (*PROFILED[:3], "fixed", "--box", "0,0,24,24"), "24 pixels wide, .* of 16: .*leave it out where it is"),
        (None, (*PROFILED, "--detector", "mesh"), "No such option.*--detector"),
        (None, (*PROFILED, "--root", "mouths"), "--from-crops lists them: give one"),
        (None, (*PROFILED, "--annotations", "absent"), "no folder .*absent of annotations"),
        (None, (*PROFILED, "--annotations", "mouths/ABOUT"), "no clip has a duration in .*ABOUT, e.g."),
        (None, (*PROFILED, "--labels", "absent.txt"), "there is no label file"),
        (None, (*PROFILED, "--labels", "mouths/ABOUT/val/ABOUT_00004.txt"), "'(ABOUT|BLACK)' .* is not in the label"),
        (None, (*PROFILED, "-m", "m.jsonl"), "m.jsonl lists other clips, those of .*corpus.*: name another"),
        (None, ("--annotations", "mouths"), "are for --from-crops DIR"),
        (landmarks, PROFILED, "none of the 12 crop files that were looked at can be packed, e.g. .*pickles"),
        (in_colour, (*PROFILED[:3], "unaligned"), "in colour, .* no known order of channels: save gray"),
        (of_another_size(260), PROFILED, "crop size 260 is outside 8 to 256"),
        (of_another_size(12), PROFILED, "crop size 12 is no multiple of 8.*--codec npy"),
        (named_alike, PROFILED, "two clips have the key 'ABOUT/train/ABOUT_00000'"),
    ],
)
def test_what_cannot_be_packed_is_said(crops, lipprep, corpus, spoil, arguments, message):
    lipprep("manifest", "lrw", corpus, "-o", "m.jsonl")
    if spoil is not None:
        spoil(crops)
    result = lipprep("shards", "-j", 1, *arguments, code=2 if "is not one" in message or "No such" in message else 1)
    assert re.search(message, result.stderr.replace("\n", " ")), result.stderr
    assert not Path("manifests/mouths.jsonl").exists() and not Path("shards").exists()


def test_crops_are_not_taken_for_videos_nor_videos_for_crops(crops, pack, lipprep, corpus):
    pack("--from-crops", crops, "--profile", "lrw2021")
    for stage in ("landmarks", "crops"):
        assert "are mouth crops already: `lipprep shards" in lipprep(stage, "-j", 1, code=1).stderr
    assert "lists mouth crops, not videos: `lipprep shards --from" in lipprep("crops", "-w", "other", code=1).stderr
    assert "leave them out" in lipprep("shards", "--exact", code=1).stderr
    lipprep("manifest", "lrw", corpus, "-o", "manifests/mouths.jsonl")
    assert "is no whole file of crops" in lipprep("shards", "-j", 1, code=1).stderr


def test_the_box_that_crops_were_cut_with_is_kept_where_it_is_known(crops, pack, lipprep):
    def box() -> list | None:
        return load_index(Path("shards")).parameters.get("box")

    assert pack("--from-crops", crops, "--profile", "fixed")["ok"] == 12 and box() is None
    assert "box: null" in Path("work/mouths/plan.yaml").read_text()
    assert pack("--from-crops", crops, "--box", "80,120,16,16", "--replace")["ok"] == 12 and box() == [80, 120, 16, 16]
    assert pack()["chunks_made"] == 0 and box() == [80, 120, 16, 16]
    pack("--profile", "unaligned", "--replace")
    assert box() is None
    said = lipprep("shards", "--profile", "fixed", "--crop-size", 8, code=1).stderr
    assert "the box 80,120,16,16 is 16 pixels wide" in said
    plan = Path("work/mouths/plan.yaml")
    plan.write_text("box: null\n")
    assert "box is null, which only" in lipprep("shards", code=1).stderr


def test_crops_in_a_store(crops, pack, bucket):
    pack("--from-crops", crops, "--profile", "lrw2021")
    for path in (p for p in crops.rglob("*") if p.is_file()):
        (bucket / "mouths" / path.relative_to(crops).as_posix()).upload(path)
    there = ("-m", "there.jsonl", "-o", "there")
    assert pack("--from-crops", f"{bucket}/mouths", "--profile", "lrw2021", *there)["ok"] == 12
    assert tars("there") == tars("shards") and pack(*there)["chunks_made"] == 0
