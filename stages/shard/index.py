"""The index of a folder of shards: all that a trainer needs to know before it opens one.

`index.json` describes the data set and each shard, `index.npz` holds the sample offsets. Both are written
last, the json after the npz, so that a folder with an index is complete.
"""

import dataclasses
import hashlib
import io
import json
import math
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.atomic import replacing, write_text
from lipprep.stages.remote import RemotePath, place
from lipprep.stages.shard.codec import MAX_CROPS
from lipprep.stages.store import RemoteError
from lipprep.stages.untrusted import check_file, printable

INDEX_VERSION = 3  # 2 had no num_frames
SPLITS = ("train", "val", "test", "unseen")
MAX_INDEX = 1 << 26  # bytes of an index.json: some 250,000 shards
_MAX_SHARDS = 10**6  # and of all other lists and objects in it
_MAX_SAMPLES = 10**7  # of one shard
_MAX_NAME = 255  # bytes of a file's name
_MAX_SIDE = math.isqrt(MAX_CROPS)  # pixels of a crop: a clip of one frame
_SMALLEST = 4 * 512  # bytes of a sample: two members, each a header and at least one block
_JOINERS = str.maketrans("", "", "\u200c\u200d")


@dataclass(frozen=True)
class Shard:
    """One tar: its name in the folder, its split, and what it holds."""

    name: str
    split: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """What stands in a folder of shards.

    `dataset` names the manifest that the shards were made from, `fingerprint` is a sha256 over all shards.
    `parameters` are those of every stage (detector, profile, crop_size, exact, codec, quality, ...).
    `failures` counts, by split, the clips that are in no shard, by class. `offsets` holds for each shard's
    name the bytes (samples + 1,) int64 where its samples start and the last one ends. `num_frames` is the median
    number of a clip's frames, None where it is not known.
    """

    dataset: str
    fingerprint: str
    labels: tuple[str, ...]
    fps: float
    parameters: Mapping
    failures: Mapping[str, Mapping[str, int]]
    shards: tuple[Shard, ...]
    offsets: Mapping[str, np.ndarray] = field(repr=False)
    num_frames: int | None = None
    version: int = INDEX_VERSION

    def split(self, name: str) -> tuple[Shard, ...]:
        """The shards of one split, in order. Raises ValueError, naming those there are, where it has none."""
        shards = tuple(s for s in self.shards if s.split == name and s.samples)
        if not shards:
            there = ", ".join(sorted({s.split for s in self.shards})) or "none"
            raise UserError(f"the shards hold no clips of split {name!r} (they hold: {there})")
        return shards

    @property
    def profile(self) -> str:
        """The alignment profile that the crops were cut with; weights are tied to it."""
        return self.parameters["profile"]

    @property
    def crop_size(self) -> int:
        """Side of a stored mouth crop, pixels."""
        return self.parameters["crop_size"]


def save_index(folder: Path | RemotePath, index: Index, scratch: Path | None = None) -> None:
    """Write index.npz and then index.json, each atomically; unfinished, they lie in `scratch`, or beside themselves."""
    folder = place(folder)
    arrays = io.BytesIO()
    np.savez(arrays, **{name: np.asarray(o, np.int64) for name, o in index.offsets.items()})
    with replacing(folder / "index.npz", scratch) as file:
        file.write(arrays.getvalue())
    plain = {f.name: getattr(index, f.name) for f in dataclasses.fields(index) if f.name != "offsets"}
    plain["labels"] = list(index.labels)
    plain["shards"] = [dataclasses.asdict(s) for s in index.shards]
    plain = {"lipprep_index": plain.pop("version"), **plain}
    plain["offsets_sha256"] = hashlib.sha256(arrays.getvalue()).hexdigest()
    write_text(folder / "index.json", json.dumps({**plain, "sha256": plain_digest(plain)}, indent=1) + "\n", scratch)


def plain_digest(plain: Mapping) -> str:
    """The sha256 of plain containers, whatever white space their JSON is written with."""
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()


def check_labels(labels: object) -> None:
    """Raise ValueError where `labels` are no list of words, or one could speak to a terminal.

    Joiners, which are invisible but part of how Persian and Indic words are spelt, may stand in a word.
    """
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise UserError("its labels are no list of words")
    for label in labels:
        if not label.translate(_JOINERS).isprintable():
            raise UserError(f"its label {ascii(label)[:80]} has characters that cannot be printed")


def check_parameters(parameters: Mapping, fps: float) -> None:
    """Raise ValueError where `parameters` or `fps` are none that crops can have been made with."""
    if not isinstance(parameters, Mapping):
        raise UserError("its parameters are no mapping")
    if not _is_name(parameters.get("profile")):
        raise UserError(f"its profile is {parameters.get('profile')!r:.80}, no name")
    for name in ("detector", "identity", "crops_from"):
        if parameters.get(name) is not None and not _is_name(parameters[name]):
            raise UserError(f"its {name} is {parameters[name]!r:.80}, no name")
    if not _is_whole(size := parameters.get("crop_size")) or not 1 <= size <= _MAX_SIDE:
        raise UserError(f"its crop_size is {size!r:.80}, no number of pixels")
    if not _is_number(fps) or not 1 <= fps <= 1000:
        raise UserError(f"its fps is {fps!r:.80}, no rate of frames from 1 to 1000")
    box = parameters.get("box")
    if box is not None and not (_is_list(box, 4) and all(map(_is_whole, box))):
        raise UserError(f"its box is {box!r:.80}, not four whole numbers x, y, w, h")
    if not isinstance(parameters.get("exact", False), bool):
        raise UserError(f"its exact is {parameters['exact']!r:.80}, neither true nor false")
    face = parameters.get("mean_face")
    pairs = _is_list(face, 68) and all(_is_list(pair, 2) and all(map(_is_number, pair)) for pair in face)
    if face is not None and not isinstance(face, str) and not pairs:
        raise UserError("its mean_face is no list of 68 points [x, y]")


def load_index(folder: Path | RemotePath) -> Index:
    """Read the index of a folder of shards and check each shard's presence and size.

    Raises ValueError where there is no index, it is of an unknown version or damaged, a shard is missing or
    of another size than the index says, or the index points outside the folder or a shard; RemoteError where a
    store does not answer.
    """
    folder = place(folder)
    index, sha256 = read_index(folder)
    # First the tars: what the index says of samples is bounded by bytes that are there.
    sizes = _sizes(folder, [shard.name for shard in index.shards])
    for shard in index.shards:
        tar = folder / shard.name
        if (size := sizes.get(shard.name)) is None:
            raise UserError(f"shard {tar} is missing: run `lipprep shards -o {folder}` again")
        if size != shard.bytes:
            raise UserError(
                f"shard {tar} has {size} bytes where the index has {shard.bytes} (cut short, or of another "
                f"run): run `lipprep shards -o {folder}` again"
            )
    return dataclasses.replace(index, offsets=read_offsets(folder, index.shards, sha256))


def _sizes(folder: Path | RemotePath, names: Sequence[str]) -> dict[str, int]:
    if isinstance(folder, RemotePath):
        return folder.sizes(names)
    return {name: (folder / name).stat().st_size for name in names if (folder / name).is_file()}


def read_index(folder: Path | RemotePath) -> tuple[Index, str]:
    """What index.json says, without the offsets, and the sha256 that index.npz must have.

    Raises ValueError where there is none, or it is of an unknown version or damaged. No shard is looked at.
    """
    return parse_index(index_text(folder), folder)


def index_text(folder: Path | RemotePath) -> str:
    """The text of index.json. Raises ValueError where there is none, or it is no text, or larger than an index is."""
    path = place(folder) / "index.json"
    if not path.is_file():
        raise UserError(f"{folder} has no index.json: `lipprep shards -o {folder}` makes the shards and their index")
    try:
        return check_file(path, "index", limit=MAX_INDEX).read_text(encoding="utf-8")
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is no usable index ({error}): run `lipprep shards -o {folder}` again") from error


def parse_index(text: str, folder: Path | RemotePath) -> tuple[Index, str]:
    """What `read_index` returns, of an index.json that was read; errors name it as that of `folder`."""
    path = place(folder) / "index.json"
    try:
        if text.count("[") + text.count("{") > _MAX_SHARDS:  # each takes 30 times its byte
            raise UserError("it holds more lists than any index")
        plain = json.loads(text)
        version = plain.pop("lipprep_index", None)
        if version not in (2, INDEX_VERSION):
            raise UserError(f"its version is {version!r:.80}, this lipprep reads 2 to {INDEX_VERSION}")
        check, of_offsets = plain.pop("sha256"), plain.pop("offsets_sha256")
        if check != plain_digest({"lipprep_index": version, **plain, "offsets_sha256": of_offsets}):
            raise UserError("it was changed or damaged since it was written")
        check_labels(plain["labels"])
        shards = tuple(Shard(**s) for s in plain.pop("shards"))
        for shard in shards:
            _check_shard(shard)
        if len({s.name for s in shards}) < len(shards):
            raise UserError("it has a shard twice")
        index = Index(**{**plain, "labels": tuple(plain["labels"])}, shards=shards, offsets={})
        check_parameters(index.parameters, index.fps)
        if not all(isinstance(text, str) for text in (index.dataset, index.fingerprint)):
            raise UserError("its dataset or fingerprint is no text")
        if index.num_frames is not None and not (_is_whole(index.num_frames) and index.num_frames > 0):
            raise UserError(f"its num_frames is {index.num_frames!r}, no number of frames")
        for split, kinds in index.failures.items():
            if not all(map(_is_name, (split, *kinds))) or not all(map(_is_whole, kinds.values())):
                raise UserError("its failures are no numbers of clips by their class")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is no usable index ({error}): run `lipprep shards -o {folder}` again") from error
    return index, of_offsets


def read_offsets(folder: Path | RemotePath, shards: Sequence[Shard], sha256: str) -> dict[str, np.ndarray]:
    """The offsets (samples + 1,) int64 of each of `shards`, by its name, from index.npz.

    Raises ValueError where the file is missing, has another sha256, or does not fit the shards.
    """
    path = place(folder) / "index.npz"
    again = f"run `lipprep shards -o {folder}` again"
    try:
        offsets = _load_offsets(path, sha256, shards)
    except RemoteError:
        raise
    except Exception as error:  # a damaged or hostile zip raises whatever its reader trips over
        raise UserError(f"{path} is damaged ({error}): {again}") from error
    for shard in shards:
        starts = offsets[shard.name]
        fits = starts.shape == (shard.samples + 1,) and starts.dtype == np.int64
        if not fits or starts[0] < 0 or (starts[1:] <= starts[:-1]).any() or starts[-1] > shard.bytes:
            raise UserError(f"the offsets of {shard.name} in {path} do not fit index.json: {again}")
    return offsets


def _load_offsets(path: Path | RemotePath, sha256: str, shards: Sequence[Shard]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise UserError("it is missing, or no file")
    sizes = {f"{s.name}.npy": 8 * (s.samples + 1) for s in shards}
    if path.stat().st_size > sum(sizes.values()) + 2048 * (len(sizes) + 1):
        raise UserError("it is larger than the offsets of these shards")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError("it was changed or damaged since it was written, or is another index's")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        # A small zip can promise any amount of zeros: memory is taken for no more than its own bytes.
        members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED or m.file_size != m.compress_size for m in members):
            raise UserError("it is compressed, as no index.npz that lipprep writes")
        if any(m.file_size > sizes.get(m.filename, 0) + 1024 for m in members):
            raise UserError("it unpacks to more than the offsets of these shards")
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {s.name: arrays[s.name] for s in shards}


def _check_shard(shard: Shard) -> None:
    name = shard.name
    plain = isinstance(name, str) and name.isascii() and name.isprintable() and len(name) <= _MAX_NAME
    if not plain or name in ("", ".", "..") or "/" in name or "\\" in name:
        raise UserError(f"{printable(repr(name), 80)} is no file name of a shard")
    told = all(_is_name(text) and text.isascii() for text in (shard.split, shard.sha256))
    if not told or not all(_is_whole(n) and n >= 0 for n in (shard.samples, shard.bytes)):
        raise UserError(f"what it says of shard {name} is of a wrong form")
    if shard.samples > _MAX_SAMPLES or shard.samples * _SMALLEST > shard.bytes:
        raise UserError(f"it says that shard {name} of {shard.bytes} bytes holds {shard.samples} samples")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and value.isprintable()


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_list(value: object, length: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == length
