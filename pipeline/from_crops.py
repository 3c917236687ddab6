"""Mouth crops that exist already, a file a clip: listed in a manifest, where they take the place of videos.

All that follows is done as with videos: chunks, records, fingerprints and the index know of no difference.
"""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lipprep.io.errors import UserError
from lipprep.pipeline.manifest import Manifest, load_manifest, save_manifest
from lipprep.pipeline.sources import VIDEO_SUFFIXES, lrw, make_manifest, read_labels
from lipprep.pipeline.wanted import Wanted
from lipprep.stages.crop_files import SUFFIXES, check_colour, crops_shape, is_crop_file
from lipprep.stages.failures import ClipFailure
from lipprep.stages.remote import REQUESTS, RemotePath, place
from lipprep.stages.untrusted import is_file, printable

_LOOKS = 64  # files whose headers tell the size of all


def manifest_of(folder: Path | RemotePath) -> Path:
    """Where the manifest of the crops below `folder` stands, unless another place is named."""
    if not (name := folder.resolve().name):
        raise UserError(f"{folder} has no name that its manifest could have: name one with -m manifests/NAME.jsonl")
    return Path("manifests") / f"{name}.jsonl"


def list_crops(
    folder: Path | RemotePath, path: Path, *, annotations: str | None = None, labels: str | None = None
) -> Manifest:
    """The manifest at `path`, made anew but not written, of FOLDER/WORD/{train,val,test}/NAME.npz or .npy.

    `annotations` is the folder of the .txt that give the words' durations, by default `folder`, and `labels` a label
    file. Seed and size of chunks are those of the manifest that is there, if any. Raises ValueError where that one
    lists other clips, or where there are no crops, annotations or labels.
    """
    from tqdm import tqdm

    if not folder.is_dir():
        raise UserError(f"there is no folder {printable(folder)} of mouth crops")
    before = load_manifest(path) if is_file(path) else None
    if before is not None and (before.root != folder.resolve() or not is_crop_file(before.clips[0].video)):
        raise UserError(
            f"{printable(path)} lists other clips, those of {printable(before.root)}: name another manifest with -m; "
            f"or, if the crops have moved, leave --from-crops out and say --root {printable(folder)}"
        )
    texts = None if annotations is None else place(annotations)
    if texts is not None and not texts.is_dir():
        raise UserError(f"there is no folder {printable(texts)} of annotations: say where with --annotations")
    # Videos are counted, so that it can be said what becomes of them.
    rows = list(tqdm(lrw(folder, suffixes=SUFFIXES | VIDEO_SUFFIXES, annotations=texts), desc="clips", unit="clip"))
    crops = [row for row in rows if is_crop_file(row.video)]
    if not crops:
        remedy = f"; its videos are for `lipprep manifest lrw {printable(folder)}`" if rows else ""
        raise UserError(
            f"there are no mouth crops WORD/{{train,val,test}}/NAME.npz or .npy below {printable(folder)}{remedy}"
        )
    if videos := len(rows) - len(crops):
        tqdm.write(
            f"{videos} videos below {printable(folder)} are left alone, for its crops are packed", file=sys.stderr
        )
    if texts is not None and all(row.duration is None for row in crops):
        example = texts / Path(crops[0].video).with_suffix(".txt").as_posix()
        raise UserError(f"no clip has a duration in {printable(texts)}, e.g. {printable(example)} tells none")
    known = None if labels is None else read_labels(Path(labels))
    kept = {} if before is None else {"seed": before.seed, "chunk_size": before.chunk_size, "fps": before.fps}
    return make_manifest(path, crops, root=folder, labels=known, **kept)


def keep_manifest(manifest: Manifest) -> None:
    """Write a manifest, unless it is there already."""
    if not is_file(manifest.path) or load_manifest(manifest.path) != manifest:
        save_manifest(manifest)


def common_size(manifest: Manifest, profile: str) -> int:
    """The side, in pixels, of most of those crop files that are looked at: some, spread over all.

    Raises ValueError where none of them can be packed, or most are in colour and `profile` does not say how.
    """
    paths = [manifest.root / clip.video for clip in manifest.clips[:: -(-len(manifest.clips) // _LOOKS)]]
    with ThreadPoolExecutor(REQUESTS if isinstance(manifest.root, RemotePath) else 1) as threads:
        looked = dict(zip(paths, threads.map(_shape, paths), strict=True))
    shapes = {path: found for path, found in looked.items() if isinstance(found, tuple)}
    if not shapes:
        raise UserError(
            f"none of the {len(paths)} crop files that were looked at can be packed, e.g. {next(iter(looked.values()))}"
        )
    usual = Counter(shape[1:] for shape in shapes.values()).most_common(1)[0][0]
    path, shape = next(item for item in shapes.items() if item[1][1:] == usual)
    check_colour(shape, profile, path)
    return shape[1]


def _shape(path: Path | RemotePath) -> tuple[int, ...] | ClipFailure:
    try:
        return crops_shape(path)
    except ClipFailure as failure:
        return failure


def check_kind(stage: str, manifest: Manifest, wanted: Wanted) -> None:
    """Raise ValueError where `stage` cannot be made of the manifest's clips: crops have no landmarks."""
    path, first = printable(manifest.path), manifest.clips[0].video
    if not wanted.from_crops and is_crop_file(first):
        raise UserError(
            f"{path} lists mouth crops, not videos: `lipprep shards --from-crops {printable(manifest.root)} -m {path} "
            "--profile NAME` packs them, where NAME says how they were aligned"
        )
    if not wanted.from_crops:
        return
    if stage != "shards":
        raise UserError(f"the clips of {path} are mouth crops already: `lipprep shards -m {path}` packs them")
    if other := next((c for c in manifest.clips if c.start is not None or not is_crop_file(c.video)), None):
        raise UserError(
            f"{path} lists {printable(other.key)}, which is no whole file of crops, and crops are to be packed "
            "(plan.yaml says from_crops): list videos under another name"
        )
