"""What is wanted of every stage, kept in work/NAME/plan.yaml so that no command need be told twice."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lipprep.io.errors import UserError
from lipprep.stages.atomic import write_text
from lipprep.stages.remote import RemotePath
from lipprep.stages.untrusted import check_file, parse_settings, printable, read_text

if TYPE_CHECKING:
    from lipprep.pipeline.plan import Layout
    from lipprep.stages.crop import CropParameters
    from lipprep.stages.shard.index import Index

_MAX_PLAN = 1 << 20  # bytes of plan.yaml, which has fifteen lines
_MAX_FACE = 1 << 16  # bytes of a mean face, which has 68 points


@dataclass(frozen=True)
class Wanted:
    """What is wanted of every stage, as work/NAME/plan.yaml keeps it; the defaults are LRW's.

    `identity` names the detector with its weights, as `lipprep landmarks` found them: other stages run where
    the weights are not. `archive` and `persons` are the folder of published landmark files and its table of
    persons; `mean_face` is an .npy file in place of the published mean face; `box` is that of profile `fixed`.
    `from_crops`: the manifest's files are no videos but mouth crops, which were cut so (`box` None: it is not known
    where); `annotations` is the folder that their words' durations are read from, and `labels` the label file, where
    they are listed again. `licence` is the data set's, for its card; it changes nothing that is made.
    """

    detector: str = "mesh"
    identity: str | None = None
    archive: str | None = None
    persons: str | None = None
    profile: str = "lrw2021"
    crop_size: int = 96
    exact: bool = False
    box: tuple[int, int, int, int] | None = (80, 116, 96, 96)
    mean_face: str | None = None
    codec: str = "jpeg"
    quality: int = 95
    from_crops: bool = False
    annotations: str | None = None
    labels: str | None = None
    licence: str | None = None


def read_wanted(path: Path | RemotePath) -> Wanted:
    """What plan.yaml says, or the defaults. Raises ValueError for a file that is not of this form."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.exists() and not path.is_symlink():
        return Wanted()
    try:
        plain = parse_settings(read_text(path, "plan", limit=_MAX_PLAN))
        fields = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Wanted), plain))
        # OmegaConf's tuples are of any length.
        box = fields["box"]
        if box is None and not fields["from_crops"]:
            raise UserError("box is null, which only that of crops in files may be")
        if box is not None and len(box) != 4:
            raise UserError(f"box has {len(box)} numbers, not 4")
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{printable(path)} is no plan of lipprep's: {printable(reason)}; mend or remove it") from error
    return Wanted(**{**fields, "box": box and tuple(box)})


def finished_index(out: Path | RemotePath, dataset: str) -> "Index | None":
    """Return the index, without offsets, of finished shards of `dataset` in `out`; None where there are none."""
    from lipprep.stages.shard.index import read_index

    try:
        index, _ = read_index(out)
    except UserError:  # not finished, or damaged
        return None
    return index if index.dataset == dataset else None


def with_parameters(wanted: Wanted, parameters: Mapping) -> Wanted:
    """Return `wanted` with the crops and the codec that an index's `parameters` tell.

    An index has the points of a mean face of one's own and not its file, which stays the wanted one.
    """
    if wanted.from_crops != (parameters.get("crops_from") == "files"):
        return wanted
    names = ("profile", "crop_size", "exact", "box", "codec", "quality")
    given = {name: parameters[name] for name in names if name in parameters}
    if given.get("box") is not None:
        given["box"] = tuple(given["box"])
    elif wanted.from_crops and given["profile"] == "fixed":
        given["box"] = None  # not known
    if parameters.get("mean_face") is None:
        given["mean_face"] = None
    return replace(wanted, **given)


def wanted_of(layout: "Layout", dataset: str) -> Wanted:
    """Return what is wanted of a data set and of its shards: finished ones stay what their index says.

    plan.yaml holds what was wanted last, which may be that of shards in another folder.
    """
    wanted = read_wanted(layout.plan)
    index = finished_index(layout.out, dataset)
    return wanted if index is None else with_parameters(wanted, index.parameters)


def write_wanted(path: Path | RemotePath, wanted: Wanted) -> None:
    """Keep what is wanted, so that the next command need not be told again."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.structured(wanted))
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def crop_parameters(wanted: Wanted) -> "CropParameters":
    """What is wanted of the crops; ValueError where no crop can be cut so."""
    from lipprep.stages.crop import CropParameters

    # Of crops in files the box need not be known, and cuts nothing.
    box = wanted.box or (0, 0, wanted.crop_size, wanted.crop_size)
    return CropParameters(profile=wanted.profile, crop_size=wanted.crop_size, exact=wanted.exact, box=box)


def load_mean_face(path: Path | None) -> np.ndarray:
    """The mean face (68, 2) float64 in an .npy file, or the published one. ValueError for any other array."""
    from lipprep.stages.align import mean_face
    from lipprep.stages.shard.codec import npy_array

    if path is None:
        return mean_face()
    name = printable(path)
    try:
        face = npy_array(check_file(Path(path), "file", limit=_MAX_FACE).read_bytes())
    except UserError as error:
        raise UserError(f"the mean face {name} cannot be read: {error}; save it with numpy.save") from error
    if face.shape != (68, 2) or face.dtype.kind not in "fiu" or not np.isfinite(face).all():
        raise UserError(
            f"the mean face {name} has shape {face.shape} and type {face.dtype}, expected (68, 2) finite numbers"
        )
    return face.astype(np.float64)
