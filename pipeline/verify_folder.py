"""What lies in a folder that is verified: tars, records, an index, and the stage that they are of."""

import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lipprep.io.errors import UserError
from lipprep.pipeline.owned import CHUNK, is_own_tar, record_owner
from lipprep.pipeline.plan import STAGES
from lipprep.pipeline.records import record_path
from lipprep.pipeline.verify_chunk import read_record_header
from lipprep.stages.remote import REQUESTS, RemotePath
from lipprep.stages.untrusted import printable


@dataclass(frozen=True)
class Folder:
    """What lies in a folder of lipprep's, by name; `headers` are those of the sound records, `foreign` tars of others.

    `listed` has the sizes in bytes of what is in a store, all told at once.
    """

    path: Path | RemotePath
    stage: str
    tars: list[str]
    records: list[str]  # the tars that they are of
    headers: list[dict]
    foreign: list[str]
    listed: Mapping[str, int] | None

    def size(self, name: str) -> int | None:
        """The size in bytes of what is there, None where nothing is; 0 where that cannot be told."""
        if self.listed is not None:
            return self.listed.get(name)
        try:
            return (self.path / name).lstat().st_size
        except FileNotFoundError:
            return None
        except OSError:
            return 0


def list_folder(path: Path | RemotePath) -> Folder:
    """List a folder and read the headers of its records; ValueError where there is none."""
    listed = {n: s.st_size for n, s in path.entries().items()} if isinstance(path, RemotePath) else None
    if not (listed or path.is_dir()):
        raise UserError(f"there is no folder {printable(path)}: name the one that holds the shards")
    names = sorted(entry.name for entry in path.iterdir()) if listed is None else list(listed)
    records = [f"{n[:-6]}.tar" for n in names if n.endswith(".jsonl") and CHUNK.fullmatch(n[:-6])]
    headers = dict(zip(records, _headers(path, records), strict=True))
    records = [n for n in records if headers[n] or record_owner(record_path(path / n)) is not None]
    stage = _stage(path, names, [header for header in headers.values() if header])
    alone = [n for n in names if n.endswith(".tar") and CHUNK.fullmatch(n[:-4]) and n not in records]
    tars = [n for n in names if n in records or (n in alone and is_own_tar(path / n, stage, None))]
    foreign = [n for n in names if n.endswith(".tar") and n not in tars]
    return Folder(path, stage, tars, records, [header for header in headers.values() if header], foreign, listed)


def _headers(path: Path | RemotePath, tars: list[str]) -> list[dict | None]:
    if not isinstance(path, RemotePath):
        return [read_record_header(path / name) for name in tars]
    with ThreadPoolExecutor(REQUESTS) as threads:
        return list(threads.map(lambda name: read_record_header(path / name), tars))


def _stage(path: Path | RemotePath, names: list[str], headers: list[dict]) -> str:
    """The stage whose artefacts these are: its index, its first sound record, or the folder's name tells."""
    if "index.json" not in names:
        if told := [h["stage"] for h in headers if h["stage"] in STAGES]:
            return told[0]
        if path.resolve().name in STAGES:
            return path.resolve().name
    return "shards"


def make_again(folder: Folder, dataset: str | None) -> str:
    """How to make anew what is missing, as far as the folder and its data set tell the command."""
    path = folder.path
    if folder.stage == "shards":
        out = f" -o {shlex.quote(str(path))}"
        if dataset is not None:
            return printable(f"run `lipprep shards -m {_manifest(dataset)}{out}` again")
        out = "" if path == Path("shards") else out
        return printable(f"run `lipprep shards{out}` again (with the manifest and -w that it was made with)")
    there = path.absolute() if isinstance(path, RemotePath) or len(path.parts) <= 2 else path
    if there.name == folder.stage and dataset in (None, there.parent.name):
        work = shlex.quote(str(there.parent.parent))
        return printable(f"run `lipprep {folder.stage} -m {_manifest(there.parent.name)} -w {work}` again")
    return f"run `lipprep {folder.stage}` again (with the manifest and -w that it was made with)"


def _manifest(dataset: str) -> str:
    return shlex.quote(f"manifests/{dataset}.jsonl")
