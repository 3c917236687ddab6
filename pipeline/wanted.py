"""What is wanted of every stage, kept in work/NAME/plan.yaml so that no command need be told twice."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lipprep.stages.atomic import write_text

if TYPE_CHECKING:
    from lipprep.stages.crop import CropParameters


@dataclass(frozen=True)
class Wanted:
    """What is wanted of every stage, as work/NAME/plan.yaml keeps it; the defaults are LRW's.

    `identity` names the detector with its weights, as `lipprep landmarks` found them: other stages run where
    the weights are not. `archive` and `persons` are the folder of published landmark files and its table of
    persons; `mean_face` is an .npy file in place of the published mean face; `box` is that of profile `fixed`.
    """

    detector: str = "mesh"
    identity: str | None = None
    archive: str | None = None
    persons: str | None = None
    profile: str = "lrw2021"
    crop_size: int = 96
    exact: bool = False
    box: tuple[int, int, int, int] = (80, 116, 96, 96)
    mean_face: str | None = None
    codec: str = "jpeg"
    quality: int = 95


def read_wanted(path: Path) -> Wanted:
    """What plan.yaml says, or the defaults. Raises ValueError for a file that is not of this form."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if not path.is_file():
        return Wanted()
    try:
        fields = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(Wanted), OmegaConf.load(path)))
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no plan of lipprep's: {error}; mend or remove it") from error
    return Wanted(**{**fields, "box": tuple(fields["box"])})


def write_wanted(path: Path, wanted: Wanted) -> None:
    """Keep what is wanted, so that the next command need not be told again."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(OmegaConf.structured(wanted))
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_text(path, text)


def crop_parameters(wanted: Wanted) -> "CropParameters":
    """What is wanted of the crops; ValueError where no crop can be cut so."""
    from lipprep.stages.crop import CropParameters

    return CropParameters(profile=wanted.profile, crop_size=wanted.crop_size, exact=wanted.exact, box=wanted.box)


def load_mean_face(path: Path | None) -> np.ndarray:
    """The mean face (68, 2) float64 in an .npy file, or the published one. ValueError for any other array."""
    from lipprep.stages.align import mean_face

    if path is None:
        return mean_face()
    try:
        face = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"the mean face {path} cannot be read: {error}") from error
    if face.shape != (68, 2) or not np.isfinite(face).all():
        raise ValueError(f"the mean face {path} has shape {face.shape}, expected (68, 2) finite numbers")
    return face.astype(np.float64)
