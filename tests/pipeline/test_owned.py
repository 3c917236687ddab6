"""No file that lipprep did not make is deleted or replaced, wherever it lies."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from traps import tars

from lipprep.pipeline.records import read_header
from lipprep.pipeline.verify import verify
from lipprep.stages.shard.index import load_index

FOREIGN = {
    "metadata.jsonl": b'{"a": 1}\n',
    "foreign.tar": b"tar",
    "foreign.jsonl": b"{}\n",
    "train-99999.tar": b"a tar of mine",
    "train-99998.jsonl": b'{"mine": 1}\n',
    "train-extra.jsonl": b"{}",
    "README.md": b"my notes",
    "notes.txt": b"d",
    ".old/mine/a.txt": b"a",
    ".probe/x": b"c",
    ".editor.tmp": b"b",
    ".train-00000.tar.mine.tmp": b"b",
    ".lock": b"mine",
    "earlier/train-00000.tar": b"x",
}
IN_THE_WAY = {
    "train-00000.tar": b"not ours",
    "train-00000.jsonl": b'{"mine": true}\n',
    "index.json": b'{"mine": true}',
    "index.npz": b"PK mine",
}


def plant(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def kept(folder: Path, files: dict[str, bytes]) -> bool:
    there = contents(folder)
    return all(there.get(name) == content for name, content in files.items())


@pytest.mark.parametrize("flags", [(), ("--replace",)], ids=["plainly", "with --replace"])
def test_foreign_files_beside_the_shards_stay_and_disturb_nothing(chain, lipprep, corpus, flags):
    chain(stages=("landmarks",))
    plant(Path("out"), FOREIGN)
    lipprep("shards", "-j", 1, "-o", "out", *flags)
    assert kept(Path("out"), FOREIGN) and len(load_index(Path("out")).shards) == 12
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl", "--chunk-size", 2, "--seed", 3)  # tars move
    lipprep("landmarks", "-j", 1)
    for again in (("--codec", "npy", "--replace"), ()):
        lipprep("shards", "-j", 1, "-o", "out", *again, *flags)
        assert kept(Path("out"), FOREIGN)
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl", "--words", "BLACK")  # tars are dropped
    lipprep("landmarks", "-j", 1)
    lipprep("shards", "-j", 1, "-o", "out", *flags)
    lipprep("index", "-o", "out")
    assert kept(Path("out"), FOREIGN)
    assert [f.kind for f in verify(Path("out"), deep=True).findings] == []
    assert sum(shard.samples for shard in load_index(Path("out")).shards) == 6


@pytest.mark.parametrize("flags", [(), ("--replace",)], ids=["plainly", "with --replace"])
@pytest.mark.parametrize("name", IN_THE_WAY)
def test_a_foreign_file_in_the_way_is_named_and_stays(chain, lipprep, name, flags):
    chain(stages=("landmarks",))
    planted = {name: IN_THE_WAY[name], "notes.txt": b"mine"}
    plant(Path("out"), planted)
    plan = Path("work/m/plan.yaml").read_bytes()
    said = lipprep("shards", "-j", 1, "-o", "out", "--codec", "npy", *flags, code=1).stderr
    assert f"out/{name} is not lipprep's" in said and "choose another -o" in said and said.count("\n") == 1
    assert {n: c for n, c in contents(Path("out")).items() if n != ".lipprep.lock"} == planted
    assert Path("work/m/plan.yaml").read_bytes() == plan


def test_a_link_to_nothing_in_the_way_stays(chain, lipprep):
    chain(stages=("landmarks",))
    Path("out").mkdir()
    Path("out/index.json").symlink_to("nowhere")
    assert "out/index.json is not lipprep's" in lipprep("shards", "-j", 1, "-o", "out", code=1).stderr
    assert Path("out/index.json").is_symlink()


@pytest.mark.parametrize("stage", ["landmarks", "crops"])
def test_foreign_files_in_a_stage_folder_stay(chain, lipprep, corpus, stage):
    chain(stages=("landmarks", "crops"))
    folder = Path("work/m") / stage
    plant(folder, FOREIGN)
    lipprep("manifest", "lrw", corpus, "-o", "manifests/m.jsonl", "--words", "BLACK", "--chunk-size", 2)
    lipprep("landmarks", "-j", 1)
    lipprep("crops", "-j", 1)
    assert kept(folder, FOREIGN) and not verify(folder).findings
    next(folder.glob("train-0000*.tar")).unlink()
    record = folder / "train-00000.jsonl"
    record.write_bytes(b'{"mine": 1}\n')
    assert "train-00000.jsonl is not lipprep's" in lipprep(stage, "-j", 1, code=1).stderr
    assert record.read_bytes() == b'{"mine": 1}\n'


def test_shards_beside_their_own_manifest(lipprep, corpus):
    lipprep("manifest", "lrw", corpus, "-o", "set.jsonl")
    listed = Path("set.jsonl").read_bytes()
    for stage in ("landmarks", "crops", "shards"):
        lipprep(stage, "-m", "set.jsonl", "-w", ".", "-j", 1, *(("-o", ".") if stage == "shards" else ()))
    assert Path("set.jsonl").read_bytes() == listed and len(load_index(Path()).shards) == 12


@pytest.mark.parametrize("damage", ["no record", "flipped", "empty", "cut tar", "index cut", "index gone"])
def test_what_a_kill_or_a_disk_did_to_own_files_is_made_again(chain, lipprep, damage):
    """Between the removal of an old record and the new one's arrival a tar of ours stands alone."""
    chain()
    whole = tars("shards")
    tar, record, index = (Path("shards", name) for name in ("train-00000.tar", "train-00000.jsonl", "index.json"))
    if damage == "no record":
        record.unlink()
    elif damage == "flipped":
        text = record.read_bytes()
        record.write_bytes(text[:3] + b"\0" + text[4:])
    elif damage == "empty":
        record.unlink()
        tar.write_bytes(bytes(10240))
    elif damage == "cut tar":
        tar.write_bytes(tar.read_bytes()[:-512])
    elif damage == "index cut":
        index.write_bytes(index.read_bytes()[:200])
    else:
        index.unlink()
    lipprep("shards", "-j", 1)
    assert tars("shards") == whole and not verify(Path("shards")).findings


def test_a_tar_of_others_clips_is_not_taken_for_one_of_a_killed_run(chain, lipprep):
    chain()
    theirs = io.BytesIO()
    with tarfile.open(fileobj=theirs, mode="w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("OTHER/train/OTHER_00001.mouth.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    Path("shards/train-00000.jsonl").unlink()
    Path("shards/train-00000.tar").write_bytes(theirs.getvalue())
    assert "train-00000.tar is not lipprep's" in lipprep("shards", "-j", 1, code=1).stderr
    assert Path("shards/train-00000.tar").read_bytes() == theirs.getvalue()


def test_another_data_set_s_shards_go_with_replace_alone(chain, lipprep, corpus):
    chain()
    lipprep("manifest", "lrw", corpus, "-o", "manifests/n.jsonl", "--words", "BLACK")
    lipprep("landmarks", "-m", "manifests/n.jsonl", "-j", 1)
    before = contents(Path("shards"))
    assert "of data set m, not of n" in lipprep("shards", "-m", "manifests/n.jsonl", "-j", 1, code=1).stderr
    assert contents(Path("shards")) == before
    Path("shards/mine.tar").write_bytes(b"mine")
    lipprep("shards", "-m", "manifests/n.jsonl", "-j", 1, "--replace")
    assert {read_header(tar)["dataset"] for tar in Path("shards").glob("t*.tar")} == {"n"}
    assert Path("shards/mine.tar").read_bytes() == b"mine"


def test_foreign_objects_below_a_prefix_stay(chain, lipprep, bucket, tmp_path):
    chain(stages=("landmarks",))
    local = {name: content for name, content in FOREIGN.items() if not name.startswith(".lock")}
    plant(tmp_path / "local", local)
    for name in local:
        (bucket / "out" / name).upload(tmp_path / "local" / name)
    for flags in ((), ("--codec", "npy", "--replace")):
        lipprep("shards", "--engine", "serial", "-o", f"{bucket}/out", *flags)
        assert {name: (bucket / "out" / name).read_bytes() for name in local} == local
    (tmp_path / "index.json").write_bytes(b"{}")
    (bucket / "other/index.json").upload(tmp_path / "index.json")
    said = lipprep("shards", "--engine", "serial", "-o", f"{bucket}/other", "--replace", code=1).stderr
    assert "other/index.json is not lipprep's" in said and sorted((bucket / "other").entries()) == ["index.json"]


def test_scratch_lies_in_the_work_folder(chain, lipprep, monkeypatch):
    """What is unfinished when a run is stopped does not stand among the shards."""
    from lipprep.pipeline import chunk

    chain(stages=("landmarks",))
    monkeypatch.setattr(chunk, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    lipprep("shards", "-j", 1, "--engine", "serial", "-o", "out", code=130)
    assert list(Path("work/m/scratch").rglob(".train-00000.tar.*.tmp"))
    assert {path.name for path in Path("out").iterdir()} <= {".lipprep.lock"}


def test_a_tar_is_published_on_another_file_system(chain, lipprep, monkeypatch):
    import errno

    chain()
    real = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if self.parent != Path(target).parent:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    lipprep("shards", "-j", 1, "--engine", "serial", "-o", "out")
    assert tars("out") == tars("shards") and not list(Path().rglob("*.tmp"))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("notes.jsonl", ["manifest", "lrw", "CORPUS", "-o", "notes.jsonl"]),
        ("page.html", ["report", "-o", "page.html"]),
        ("report.html", ["report"]),
    ],
)
def test_a_named_output_is_no_foreign_file(chain, lipprep, corpus, name, command):
    chain()
    Path(name).write_text("my own words")
    said = lipprep(*(str(corpus) if word == "CORPUS" else word for word in command), code=1).stderr
    assert f"{name} is not lipprep's" in said and Path(name).read_text() == "my own words"
    Path(name).unlink()
    for _ in range(2):  # its own it replaces
        lipprep(*(str(corpus) if word == "CORPUS" else word for word in command), "-m", "manifests/m.jsonl") if (
            command[0] == "report"
        ) else lipprep(*(str(corpus) if word == "CORPUS" else word for word in command))


def test_a_foreign_report_in_the_work_folder_stays(chain, lipprep):
    chain()
    Path("work/report.json").write_text('{"mine": 1}')
    assert "no report is kept there" in lipprep("shards", "-j", 1).stderr
    assert Path("work/report.json").read_text() == '{"mine": 1}'


def test_the_sample_replaces_no_videos_of_another_corpus(lipprep, tmp_path):
    video = tmp_path / "videos/ABOUT/test/ABOUT_00001.mp4"
    video.parent.mkdir(parents=True)
    video.write_bytes(b"mine")
    assert "is of another corpus" in lipprep("sample", "videos", "-n", 30, code=1).stderr
    assert video.read_bytes() == b"mine"


def test_finished_shards_stay_what_their_index_says(chain, lipprep):
    """What was wanted last is wanted of new shards: those of a side experiment change no others."""
    chain()
    before = contents(Path("shards"))
    lipprep("shards", "-j", 1, "-o", "B", "--codec", "npy", "--profile", "lrw2022")
    result = lipprep("shards", "-j", 1, "--json")
    assert json.loads(result.stdout)["chunks_made"] == 0 and contents(Path("shards")) == before
    assert "codec jpeg -> npy, profile lrw2021 -> lrw2022" in result.stderr and "--replace" in result.stderr
    assert "stale" not in lipprep("status").stdout.partition("shards")[2]
    for flags, what in (
        (("--codec", "npy"), "codec jpeg -> npy"),
        (("--profile", "lrw2022"), "profile lrw2021 -> lrw2022"),
        (("--quality", 50), "quality 95 -> 50"),
        (("--crop-size", 88), "crop_size 96 -> 88"),
        (("--exact",), "exact False -> True"),
    ):
        said = lipprep("shards", "-j", 1, *flags, code=1).stderr
        assert what in said and "--replace" in said and contents(Path("shards")) == before
    assert "npy" in Path("work/m/plan.yaml").read_text()  # refused flags are not kept
    assert json.loads(lipprep("shards", "-j", 1, "--codec", "jpeg", "--json").stdout)["chunks_made"] == 0
    lipprep("shards", "-j", 1, "--quality", 50, "--replace")
    parameters = load_index(Path("shards")).parameters
    assert (parameters["quality"], parameters["codec"], parameters["profile"]) == (50, "jpeg", "lrw2021")


def test_a_mean_face_that_only_the_index_knows_is_asked_for(chain, lipprep):
    from lipprep.stages.align import mean_face

    chain(stages=("landmarks",))
    np.save("face.npy", mean_face() * 1.1)
    lipprep("shards", "-j", 1, "--mean-face", "face.npy")
    before = contents(Path("shards"))
    lipprep("shards", "-j", 1, "-o", "B", "--mean-face", "published")
    assert "another mean_face" in lipprep("shards", "-j", 1, code=1).stderr
    assert json.loads(lipprep("shards", "-j", 1, "--mean-face", "face.npy", "--json").stdout)["chunks_made"] == 0
    assert contents(Path("shards")) == before


def test_a_command_that_refuses_leaves_the_plan(chain, lipprep):
    chain(stages=("landmarks",))
    plan = Path("work/m/plan.yaml").read_bytes()
    for tar in Path("work/m/landmarks").glob("val*.tar"):
        tar.unlink()
    for command in (["crops", "--crop-size", 88], ["shards", "--codec", "npy"], ["shards", "--profile", "lrw2022"]):
        assert "run `lipprep landmarks` first" in lipprep(*command, "-j", 1, code=1).stderr
        assert Path("work/m/plan.yaml").read_bytes() == plan
    lipprep("landmarks", "--root", "nowhere", "--detector", "fan", code=1)
    assert Path("work/m/plan.yaml").read_bytes() == plan


def test_an_archive_that_was_moved_is_the_same(lipprep, golden, tmp_path):
    folder = golden / "crops"
    lipprep("manifest", "lrw", folder / "videos", "-o", "manifests/m.jsonl")
    one = shutil.copytree(folder / "landmarks_npz", tmp_path / "one")
    lipprep("landmarks", "-j", 1, "--archive", one)
    before = contents(Path("work/m/landmarks"))
    one.rename(tmp_path / "two")
    figures = json.loads(lipprep("landmarks", "-j", 1, "--archive", tmp_path / "two", "--json").stdout)
    assert figures["chunks_made"] == 0 and contents(Path("work/m/landmarks")) == before
    shutil.copytree(tmp_path / "two", tmp_path / "three", copy_function=shutil.copyfile)  # with other times
    figures = json.loads(lipprep("landmarks", "-j", 1, "--archive", tmp_path / "three", "--json").stdout)
    assert figures["clips_computed"] == 0 < figures["chunks_made"]
    assert str(tmp_path) not in "".join(p.read_text() for p in Path("work/m/landmarks").glob("*.jsonl"))
