"""The whole pipeline on real, tiny videos, through the command line."""

import hashlib
import json
import os
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from lipprep.pipeline.records import read_entries, read_header
from lipprep.stages.shard.index import load_index
from lipprep.stages.shard.reader import read_samples


def digests(folder: Path = Path("shards")) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.tar"))}


def rows(lipprep) -> dict[str, dict]:
    return {row["stage"]: row for row in json.loads(lipprep("status", "--json").stdout)}


def samples(folder: Path = Path("shards")) -> dict[str, dict]:
    index = load_index(folder)
    found = [
        s
        for shard in index.shards
        for s in read_samples(folder / shard.name, index.offsets[shard.name], range(shard.samples))
    ]
    return {s["key"]: s for s in found}


@pytest.fixture
def own(corpus, tmp_path) -> Path:
    """A copy of the corpus to spoil."""
    return shutil.copytree(corpus, tmp_path / "own")


def test_videos_become_shards(chain, lipprep, corpus):
    figures = chain()
    assert figures["planned"] == figures["ok"] == 12 and figures["failed"] == {}
    found = samples()
    assert sorted(found) == sorted(p.relative_to(corpus).with_suffix("").as_posix() for p in corpus.rglob("*.mp4"))
    sample = found["BLACK/train/BLACK_00002"]
    assert sample["mouth"].shape == (14, 96, 96) and sample["mouth"].std() > 5
    assert (sample["word"], sample["label"], sample["split"], sample["duration"]) == ("BLACK", 1, "train", 0.22)
    index = load_index(Path("shards"))
    assert index.dataset == "m" and index.labels == ("ABOUT", "BLACK") and index.profile == "lrw2021"
    assert index.parameters["detector"] == "mesh" and {s.split for s in index.shards} == {"train", "val", "test"}
    for shard in index.shards:
        tar = Path("shards") / shard.name
        assert hashlib.sha256(tar.read_bytes()).hexdigest() == shard.sha256 == read_header(tar)["tar"]["sha256"]


def test_a_second_run_makes_nothing(chain, lipprep):
    chain()
    before = {p: p.stat().st_mtime_ns for p in Path().rglob("*.tar")}
    assert chain()["chunks_made"] == 0
    assert {p: p.stat().st_mtime_ns for p in Path().rglob("*.tar")} == before
    assert all(row["fresh"] == row["chunks"] for name, row in rows(lipprep).items() if name != "crops")


def test_stored_crops_give_the_same_bytes_as_crops_in_passing(chain, lipprep):
    chain()
    passing = digests()
    shutil.rmtree("shards")
    lipprep("crops", "-j", 1)
    assert json.loads(lipprep("shards", "-j", 1, "--json").stdout)["chunks_made"] == len(passing)
    assert digests() == passing


def test_two_workers_give_the_same_bytes_as_one(chain, lipprep):
    chain()
    one = digests()
    shutil.rmtree("shards")
    shutil.rmtree("work")
    lipprep("landmarks", "-j", 2)
    lipprep("shards", "-j", 2)
    assert digests() == one


def test_what_is_missing_is_made_again_and_nothing_else(chain, lipprep):
    chain()
    whole = digests()
    tars = sorted(Path("shards").glob("*.tar"))
    tars[0].unlink()
    tars[1].with_suffix(".jsonl").unlink()
    tars[2].write_bytes(tars[2].read_bytes()[:-1024])
    assert rows(lipprep)["shards"]["missing"] == 3
    assert json.loads(lipprep("shards", "-j", 1, "--json").stdout)["chunks_made"] == 3
    assert digests() == whole


def test_a_changed_parameter_is_named_and_remade(chain, lipprep):
    chain()
    Path("shards/index.json").unlink()  # unfinished shards are what was wanted last
    lipprep("crops", "-j", 1, "--crop-size", 88)
    status = lipprep("status")
    assert "stale: crop_size 96 -> 88" in status.stdout
    assert rows(lipprep)["landmarks"]["stale"] == 0
    lipprep("shards", "-j", 1)
    assert {s["mouth"].shape for s in samples().values()} == {(14, 88, 88)}
    assert load_index(Path("shards")).crop_size == 88
    assert "stale" not in [c.strip() for c in lipprep("status").stdout.split(":")]


def test_what_was_wanted_once_is_wanted_again(chain, lipprep):
    chain()
    lipprep("shards", "-j", 1, "--codec", "npy", "--profile", "lrw2022", "--replace")
    assert json.loads(lipprep("shards", "-j", 1, "--json").stdout)["chunks_made"] == 0
    assert load_index(Path("shards")).parameters["codec"] == "npy"
    assert load_index(Path("shards")).profile == "lrw2022"


def test_a_changed_label_remakes_shards_and_no_landmarks(chain, lipprep, own):
    chain(own)
    landmarks = digests(Path("work/m/landmarks"))
    (own / "ABOUT/train/ABOUT_00001.txt").write_text("Duration: 0.50 seconds")
    assert chain(own)["chunks_made"] == 1
    assert samples()["ABOUT/train/ABOUT_00001"]["duration"] == 0.5
    assert digests(Path("work/m/landmarks")) == landmarks
    headers = [read_header(p) for p in Path("work/m/landmarks").glob("*.tar")]
    assert all(h is not None for h in headers)


def test_a_replaced_video_is_noticed_and_only_its_clip_computed(chain, lipprep, own):
    chain(own)
    before = {e["key"]: e for tar in Path("work/m/landmarks").glob("*.tar") for e in read_entries(tar)}
    shutil.copy(own / "BLACK/train/BLACK_00003.mp4", own / "BLACK/train/BLACK_00001.mp4")
    assert rows(lipprep)["landmarks"]["reasons"] == {"videos were replaced or touched": 1}
    assert chain(own)["chunks_made"] == 1
    after = {e["key"]: e for tar in Path("work/m/landmarks").glob("*.tar") for e in read_entries(tar)}
    changed = {k for k in before if before[k]["parts"] != after[k]["parts"]}
    assert changed == {"BLACK/train/BLACK_00001"}
    found = samples()
    assert np.array_equal(found["BLACK/train/BLACK_00001"]["mouth"], found["BLACK/train/BLACK_00003"]["mouth"])


def test_the_result_does_not_depend_on_the_way_there(chain, lipprep, own, tmp_path):
    """A corpus that was spoilt, run, mended and run again gives the bytes of one that was never spoilt."""
    chain(own)
    undisturbed = digests()
    shutil.rmtree("shards")
    shutil.rmtree("work")
    video = own / "ABOUT/val/ABOUT_00005.mp4"
    whole, times = video.read_bytes(), video.stat()
    video.write_bytes(b"rubbish")
    assert chain(own)["failed"] == {"unreadable": 1}
    assert digests() != undisturbed
    video.write_bytes(whole)
    os.utime(video, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert chain(own)["failed"] == {}
    assert digests() == undisturbed


def test_every_clip_is_in_a_shard_or_in_a_record_that_says_why(chain, lipprep, own, make_video):
    rng = np.random.default_rng(0)
    train = own / "ABOUT/train"
    (train / "ABOUT_00001.mp4").write_bytes(b"")
    (train / "ABOUT_00002.mp4").write_bytes(rng.bytes(5000))
    make_video(train / "ABOUT_00003.mp4", [rng.integers(0, 255, (96, 128), np.uint8)] * 8)
    (own / "BLACK/train/BLACK_00001.mp4").unlink()
    (own / "BLACK/train/BLACK_00001.mp4").mkdir()
    figures = chain(own, stages=("landmarks", "crops", "shards"))
    assert figures["planned"] == 12 == figures["ok"] + sum(figures["failed"].values())
    assert figures["failed"] == {"unreadable": 3, "no_face": 1}
    failed = {e["key"]: e for t in Path("shards").glob("*.tar") for e in read_entries(t) if e["status"] == "failed"}
    assert len(failed) == 4 and all(e["class"] == "upstream" and e["message"] for e in failed.values())
    assert {e["upstream"]["stage"] for e in failed.values()} == {"landmarks"}
    assert len(samples()) == 8
    assert load_index(Path("shards")).failures["train"] == {"no_face": 1, "unreadable": 3}


def test_clips_of_any_length_size_and_rate(chain, lipprep, own, make_video, face_frames):
    import cv2

    train = own / "ABOUT/train"
    make_video(train / "ABOUT_00001.mp4", face_frames[:1])
    make_video(train / "ABOUT_00002.mp4", [cv2.resize(f, (400, 360)) for f in face_frames[:9]])
    make_video(train / "ABOUT_00003.mp4", face_frames[:20], fps=50)
    assert chain(own)["failed"] == {}
    lengths = {key: s["mouth"].shape for key, s in samples().items()}
    assert [lengths[f"ABOUT/train/ABOUT_0000{n}"] for n in (1, 2, 3)] == [(1, 96, 96), (9, 96, 96), (10, 96, 96)]


def test_too_many_failures_fail_the_run_and_keep_what_was_made(chain, lipprep, own):
    (own / "ABOUT/train/ABOUT_00001.mp4").write_bytes(b"")
    lipprep("manifest", "lrw", own, "-o", "manifests/m.jsonl")
    result = lipprep("landmarks", "-j", 1, code=1)
    assert "1 of 12 clips failed" in result.stderr and "unreadable: 1" in result.stdout
    lipprep("landmarks", "-j", 1, "--max-failures", "1")
    lipprep("landmarks", "-j", 1, "--max-failures", "10%")
    assert rows(lipprep)["landmarks"]["missing"] == 0


def test_failed_clips_are_tried_again_when_asked(chain, lipprep, own):
    video = own / "ABOUT/train/ABOUT_00001.mp4"
    whole, times = video.read_bytes(), video.stat()
    video.write_bytes(bytes(len(whole)))
    os.utime(video, ns=(times.st_atime_ns, times.st_mtime_ns))
    chain(own)
    video.write_bytes(whole)  # as a share that was out of reach and came back: same size, same time
    os.utime(video, ns=(times.st_atime_ns, times.st_mtime_ns))
    run = ["landmarks", "-j", 1, "--json", "--max-failures", "100%"]
    assert json.loads(lipprep(*run).stdout)["chunks_made"] == 0
    assert json.loads(lipprep(*run, "--retry-failed=no_face").stdout)["chunks_made"] == 0
    assert json.loads(lipprep(*run, "--retry-failed").stdout)["failed"] == {}


def test_order_of_commands(lipprep, corpus):
    assert "lipprep manifest lrw" in lipprep("landmarks", code=1).stderr
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl")
    assert "run `lipprep landmarks` first" in lipprep("shards", code=1).stderr


def test_a_fixed_box_needs_no_landmarks(lipprep, corpus):
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl")
    lipprep("shards", "-j", 1, "--profile", "fixed", "--box", "70,120,112,112")
    assert {s["mouth"].shape for s in samples().values()} == {(14, 112, 112)}
    assert set(rows(lipprep)) == {"crops", "shards"}


def test_another_data_set_is_not_overwritten(chain, lipprep, corpus):
    chain()
    lipprep("manifest", "lrw", corpus, "-o", "other.jsonl", "--words", "BLACK")
    lipprep("landmarks", "-m", "other.jsonl", "-j", 1)
    result = lipprep("shards", "-m", "other.jsonl", "-j", 1, code=1)
    assert "data set m, not of other" in result.stderr and "--replace" in result.stderr
    Path("shards/index.json").unlink()  # as after a stop in mid-run
    assert "data set m" in lipprep("shards", "-m", "other.jsonl", "-j", 1, code=1).stderr
    lipprep("shards", "-m", "other.jsonl", "-j", 1, "--replace")
    assert len(samples()) == 6 == sum(read_header(t)["planned"] for t in Path("shards").glob("*.tar"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop-size", 100], "multiple of 8"),
        (["--crop-size", 999], "outside 8 to 256"),
        (["--box", "1,2"], "X,Y,W,H"),
        (["--mean-face", "face.npy"], "expected (68, 2)"),
        (["--mean-face", "absent.npy"], "cannot be read"),
    ],
)
def test_flags_that_cannot_be(chain, lipprep, flags, message):
    chain(stages=("landmarks",))
    np.save("face.npy", np.zeros((5, 2)))
    assert message in lipprep("shards", *flags, code=1).stderr
    lipprep("shards", "-j", 1)  # and they were not kept


def test_another_mean_face(chain, lipprep):
    from lipprep.stages.align import mean_face

    chain()
    plain = digests()
    np.save("face.npy", mean_face() * 1.1)
    lipprep("shards", "-j", 1, "--mean-face", "face.npy", "--replace")
    assert digests() != plain
    assert np.allclose(load_index(Path("shards")).parameters["mean_face"], mean_face() * 1.1)


def test_windows_of_one_video(lipprep, corpus):
    video = next(corpus.rglob("*.mp4")).relative_to(corpus).as_posix()
    lines = [f"{video},w{n % 2},train,{start},8" for n, start in enumerate((-3, 0, 5, 10))]
    Path("t.csv").write_text("video,word,split,start,num_frames\n" + "\n".join([*lines, f"{video},w0,train,99,8"]))
    lipprep("manifest", "csv", "t.csv", "--root", corpus, "-o", "manifests/t.jsonl")
    lipprep("landmarks", "-j", 1, "--max-failures", 1)
    lipprep("shards", "-j", 1, "--max-failures", 1)
    found = {key.split("@")[1]: s["mouth"] for key, s in samples().items()}
    assert {k: m.shape for k, m in found.items()} == dict.fromkeys(("-3", "0", "5", "10"), (8, 96, 96))
    assert load_index(Path("shards")).failures["train"] == {"too_short": 1}


def test_check_lists_what_is_wrong_before_the_work(chain, lipprep, own):
    (own / "ABOUT/train/ABOUT_00001.mp4").write_bytes(b"")
    (own / "BLACK/val/BLACK_00005.mp4").unlink()
    shutil.copy(own / "BLACK/test/BLACK_00006.mp4", own / "BLACK/val/BLACK_00005.mp4")
    lipprep("manifest", "lrw", own, "-o", "manifests/m.jsonl")
    (own / "BLACK/test/BLACK_00006.mp4").unlink()
    result = lipprep("manifest", "check", "--json", code=1)
    problems = {p["video"]: p["class"] for p in json.loads(result.stdout)["problems"]}
    assert problems == {"ABOUT/train/ABOUT_00001.mp4": "unreadable", "BLACK/test/BLACK_00006.mp4": "unreadable"}
    assert "11 videos" not in lipprep("manifest", "check", "--min-frames", 15, code=1).stdout
    assert lipprep("manifest", "check", "--min-frames", 15, code=1).stdout.count("too_short") == 10


def test_published_landmarks_in_place_of_a_detector(lipprep, golden):
    folder = golden / "crops"
    lipprep("manifest", "lrw", folder / "videos", "-o", "manifests/m.jsonl")
    lipprep("landmarks", "-j", 1, "--archive", folder / "landmarks_npz", "--persons", folder / "detected_face.csv")
    lipprep("shards", "-j", 1, "--codec", "npy", "--exact")
    for key, sample in samples().items():
        with np.load(folder / "legacy_gray" / f"{key}.npz") as arrays:
            assert np.abs(sample["mouth"].astype(int) - arrays["data"]).mean() <= 0.2
    with tarfile.open(next(Path("work/m/landmarks").glob("*.tar"))) as tar:
        assert tar.getnames()[0].endswith(".landmarks.npy")


def test_landmark_files_that_do_not_fit(lipprep, golden, tmp_path):
    folder = golden / "crops"
    archive = shutil.copytree(folder / "landmarks_pkl", tmp_path / "lm")
    import pickle

    (archive / "ABOUT/test/ABOUT_00001.pkl").unlink()
    (archive / "ABOUT/test/ABOUT_00002.pkl").write_bytes(pickle.dumps([np.zeros((4, 2))] * 29))
    (archive / "ABSOLUTELY/test/ABSOLUTELY_00001.pkl").write_bytes(pickle.dumps([np.ones((68, 2)) * 9] * 20))
    lipprep("manifest", "lrw", folder / "videos", "-o", "manifests/m.jsonl")
    lipprep("landmarks", "-j", 1, "--archive", archive, "--max-failures", "100%")
    figures = json.loads(lipprep("shards", "-j", 1, "--max-failures", "100%", "--json").stdout)
    assert figures["ok"] == 1
    assert set(figures["failed"]) <= {"landmarks_missing", "bad_landmarks", "landmarks_mismatch"}
    assert sum(figures["failed"].values()) == 3


def test_from_a_fixed_box_to_aligned_crops_and_back(lipprep, corpus):
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl")
    lipprep("shards", "-j", 1, "--profile", "fixed", "--box", "70,120,112,112")
    assert "none of" not in lipprep("landmarks", "-j", 1).output
    lipprep("shards", "-j", 1, "--profile", "lrw2021", "--replace")
    assert {s["mouth"].shape for s in samples().values()} == {(14, 96, 96)}
    assert "--box is for --profile fixed" in lipprep("shards", "--box", "0,0,64,64", code=1).stderr


def test_a_box_that_leaves_the_frame_fails_its_clips(lipprep, corpus):
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl")
    result = lipprep("shards", "-j", 1, "--profile", "fixed", "--box", "200,200,96,96", "--max-failures", "100%")
    assert "error: 12" in result.stdout and "leaves the 256x256 frames" in result.stdout


def test_videos_out_of_reach_cost_nothing(chain, lipprep, own):
    chain(own)
    landmarks = digests(Path("work/m/landmarks"))
    own.rename(own.with_name("away"))
    assert "is a disk not mounted?" in lipprep("landmarks", "-j", 1, code=1).stderr
    own.mkdir()
    shutil.copytree(own.with_name("away") / "BLACK", own / "BLACK")  # half of the corpus is back
    assert "are missing below" in lipprep("status").stdout
    lipprep("landmarks", "-j", 1)
    assert digests(Path("work/m/landmarks")) == landmarks


def test_a_record_cut_short_is_none(chain, lipprep):
    chain()
    whole = digests()
    record = min(Path("shards").glob("train-*.jsonl"))
    record.write_text(record.read_text().splitlines(keepends=True)[0])
    assert rows(lipprep)["shards"]["missing"] == 1
    lipprep("shards", "-j", 1)
    assert digests() == whole and len(samples()) == 12


def test_shards_do_not_go_where_other_artefacts_are(chain, lipprep):
    chain(stages=("landmarks",))
    assert "artefacts of another stage" in lipprep("shards", "-o", "work/m/landmarks", code=1).stderr


def test_a_clip_whose_crop_failed_once_is_cut_in_passing(chain, lipprep, own):
    chain(own, stages=("landmarks",))
    video = own / "ABOUT/train/ABOUT_00001.mp4"
    whole, times = video.read_bytes(), video.stat()

    def put(content: bytes) -> None:
        video.write_bytes(content)
        os.utime(video, ns=(times.st_atime_ns, times.st_mtime_ns))

    put(bytes(len(whole)))
    lipprep("crops", "-j", 1, "--max-failures", "100%")
    put(whole)
    assert json.loads(lipprep("shards", "-j", 1, "--json").stdout)["ok"] == 12


def test_damage_is_neither_copied_nor_built_upon(lipprep, corpus):
    video = next(corpus.rglob("*.mp4")).relative_to(corpus).as_posix()

    def run(duration: float) -> dict[str, str]:
        lines = [f"{video},w,train,{start},8,{duration if start == 5 else 0.3}" for start in (0, 5)]
        Path("t.csv").write_text("video,word,split,start,num_frames,duration\n" + "\n".join(lines))
        lipprep("manifest", "csv", "t.csv", "--root", corpus, "-o", "manifests/t.jsonl")
        lipprep("landmarks", "-j", 1)
        lipprep("shards", "-j", 1)
        return digests()

    def spoil(tar: Path, place: int) -> None:
        data = bytearray(tar.read_bytes())
        data[place] ^= 1
        tar.write_bytes(data)

    whole = run(0.3)
    shard = Path("shards/train-00000.tar")
    spoil(shard, read_entries(shard)[0]["offset"] + 2000)  # in the clip that need not be made again
    run(0.4)
    assert run(0.3) == whole

    landmarks = Path("work/t/landmarks/train-00000.tar")
    spoil(landmarks, landmarks.stat().st_size // 3)
    shutil.rmtree("shards")
    assert "was damaged since it was made: run `lipprep landmarks`" in lipprep("shards", "-j", 1, code=1).stderr
    assert run(0.3) == whole


def test_flags_without_an_effect_are_refused(chain, lipprep, tmp_path):
    chain(stages=("landmarks",))
    assert "no class of failures" in lipprep("landmarks", "--retry-failed=no_fcae", code=1).stderr
    assert "neither a share" in lipprep("landmarks", "--max-failures", "nan", code=2).stderr
    assert "are for --detector archive" in lipprep("landmarks", "--detector", "mesh", "--archive", ".", code=1).stderr


def test_a_mean_face_can_be_left_again(chain, lipprep):
    from lipprep.stages.align import mean_face

    chain()
    plain = digests()
    np.save("face.npy", mean_face() * 1.1)
    lipprep("shards", "-j", 1, "--mean-face", "face.npy", "--replace")
    lipprep("shards", "-j", 1, "--mean-face", "published", "--replace")
    assert digests() == plain


def test_windows_before_the_damage_are_as_in_the_whole_video(lipprep, make_video, face_frames):
    video = make_video(Path("videos/v.avi"), face_frames, codec="ffv1")
    whole = video.read_bytes()
    lines = [f"v.avi,w{n % 2},train,{start},6" for n, start in enumerate((-2, 5, 18, 22))]
    Path("t.csv").write_text("video,word,split,start,num_frames\n" + "\n".join(lines))

    def run(content: bytes) -> tuple[dict, dict]:
        video.write_bytes(content)
        lipprep("manifest", "csv", "t.csv", "--root", "videos", "-o", "manifests/t.jsonl")
        lipprep("landmarks", "-j", 1, "--max-failures", "100%")
        figures = json.loads(lipprep("shards", "-j", 1, "--json", "--max-failures", "100%").stdout)
        return figures["failed"], {key: s["mouth"] for key, s in samples().items()}

    failed, sound = run(whole)
    assert failed == {} and len(sound) == 4
    place = len(whole) * 6 // 10  # an avi's frames stand one after another, each in a packet
    failed, found = run(whole[:place])
    assert failed == {"truncated": 2} and set(found) == {"v@-2", "v@5"}
    assert all(np.array_equal(found[key], sound[key]) for key in found)


def test_a_video_that_was_out_of_reach_for_the_crops_is_cut_once_it_is_back(chain, lipprep, own):
    chain(own)
    whole = digests()
    shutil.rmtree("shards")
    video = own / "BLACK/train/BLACK_00001.mp4"
    video.rename(video.with_suffix(".away"))
    for stage in ("landmarks", "shards"):
        figures = json.loads(lipprep(stage, "-j", 1, "--json", "--max-failures", "100%").stdout)
    assert figures["failed"] == {"unreadable": 1}
    video.with_suffix(".away").rename(video)
    for stage in ("landmarks", "shards"):
        figures = json.loads(lipprep(stage, "-j", 1, "--json").stdout)
    assert figures["clips_computed"] == 1 and digests() == whole


@pytest.mark.parametrize("touched", [True, False])
def test_a_video_that_was_another_one_for_the_crops_is_cut_once_it_is_back(touched, chain, lipprep, own):
    """Though size and time were those of the video that its landmarks were found in."""
    chain(own, stages=("landmarks",))
    video = own / "BLACK" / "train" / "BLACK_00002.mp4"
    before, sound = video.stat(), video.read_bytes()
    video.write_bytes(b"\0" * len(sound))
    os.utime(video, ns=(before.st_atime_ns, before.st_mtime_ns))
    crops = ("crops", "-j", 1, "--json", "--max-failures", "100%")
    for _ in range(2):
        assert json.loads(lipprep(*crops).stdout)["failed"] == {"unreadable": 1}
    video.write_bytes(sound)
    os.utime(video, ns=(before.st_atime_ns, before.st_mtime_ns + 10**9 * touched))
    lipprep("landmarks", "-j", 1)
    figures = json.loads(lipprep(*crops).stdout)
    assert figures["failed"] == {} and figures["clips_computed"] == 1
    assert "0 chunks made" in lipprep("crops", "-j", 1).stdout
