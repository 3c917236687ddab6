"""Face landmarks: 68 iBUG points a frame, from a detector or from a published archive.

Detectors stand behind one small interface (`Detector`): `mesh` is inside the package, `fan` and `dlib` need
weights of other people. `track` follows one face through a clip with any of them; `read_archive` reads the
landmark files of the field instead.
"""

from lipprep.stages.landmarks.detector import Detector, Face, choose_face
from lipprep.stages.landmarks.track import ClipLandmarks, track

__all__ = ["DETECTORS", "ClipLandmarks", "Detector", "Face", "choose_face", "load_detector", "track"]

DETECTORS = ("mesh", "fan", "dlib")


def load_detector(name: str, *, device: str = "cpu") -> Detector:
    """Load a detector by name: mesh, fan or dlib. `device` is a torch device and matters to fan alone.

    Raises ValueError for another name, and where the weights or the package of a detector are missing.
    """
    if name == "mesh":
        from lipprep.stages.landmarks.mesh import Mesh

        return Mesh()
    if name == "fan":
        from lipprep.stages.landmarks.fan import Fan

        return Fan(device=device)
    if name == "dlib":
        from lipprep.stages.landmarks.dlib import Dlib

        return Dlib()
    raise ValueError(f"unknown landmark detector {name!r}; choose one of {', '.join(DETECTORS)}")
