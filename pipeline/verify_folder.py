"""What lies in a folder that is verified: tars, records, an index, and the stage that they are of."""

import re
import shlex
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lipprep.io.errors import UserError
from lipprep.pipeline.plan import STAGES
from lipprep.pipeline.verify_chunk import read_record_header
from lipprep.stages.remote import REQUESTS, RemotePath
from lipprep.stages.shard.index import SPLITS
from lipprep.stages.untrusted import printable

CHUNK = re.compile(rf"({'|'.join(SPLITS)})-(\d{{5,}})")


@dataclass(frozen=True)
class Folder:
    """What lies in a folder, by name; `headers` are those of the sound records. Foreign tars are left alone.

    `listed` has the sizes in bytes of what is in a store, all told at once.
    """

    path: Path | RemotePath
    stage: str
    tars: list[str]
    records: list[str]  # the tars that they are of
    headers: list[dict]
    leftovers: list[str]
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
    hidden = [n for n in names if n.startswith(".")]
    records = [f"{n[:-6]}.tar" for n in names if n.endswith(".jsonl") and CHUNK.fullmatch(n[:-6])]
    tars = [n for n in names if n.endswith(".tar") and n not in hidden]
    leftovers = [n for n in hidden if n.endswith(".tmp")]
    if "index.json" not in names and not records and not any(CHUNK.fullmatch(n[:-4]) for n in tars):
        tars = []
    headers = [header for header in _headers(path, records) if header]
    return Folder(path, _stage(path, names, headers), tars, records, headers, leftovers, listed)


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
