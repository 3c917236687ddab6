"""Face landmarks: 68 iBUG points a frame, from a detector or from a published archive.

Detectors stand behind one small interface (`Detector`): `mesh` is inside the package, `fan` and `dlib` need
weights of other people. `track` follows one face through a clip with any of them, `track_clips` through many clips
at once, and `faces.track_faces` all faces of a video; `read_archive` reads the landmark files of the field instead.
"""

from lipprep.io.errors import UserError
from lipprep.stages.landmarks.batch import BatchDetector, track_clips
from lipprep.stages.landmarks.detector import Detector, Face, choose_face
from lipprep.stages.landmarks.track import ClipLandmarks, track

__all__ = [
    "DETECTORS",
    "BatchDetector",
    "ClipLandmarks",
    "Detector",
    "Face",
    "choose_face",
    "load_detector",
    "track",
    "track_clips",
]

DETECTORS = ("mesh", "fan", "dlib")


def load_detector(name: str, *, device: str = "cpu") -> Detector:
    """Load a detector by name: mesh, fan or dlib. `device` is a torch device for mesh and fan.

    Raises ValueError for another name, where the weights or the package of a detector are missing, for a device
    that is not there, and for dlib on any but the CPU, which is all it knows.
    """
    if device.startswith("cpu:"):  # torch's name of the same
        device = "cpu"
    if name == "dlib" and device != "cpu":
        raise UserError(f"the detector dlib runs on the CPU alone, not on {device!r}: use the detector mesh or fan")
    if name in DETECTORS and device != "cpu":
        _check_device(device)
    if name == "mesh" and device != "cpu":
        from lipprep.stages.landmarks.torch_mesh import TorchMesh

        return TorchMesh(device=device)
    if name == "mesh":
        from lipprep.stages.landmarks.mesh import Mesh

        return Mesh()
    if name == "fan":
        from lipprep.stages.landmarks.fan import Fan

        return Fan(device=device)
    if name == "dlib":
        from lipprep.stages.landmarks.dlib import Dlib

        return Dlib()
    raise UserError(f"unknown landmark detector {name!r}; choose one of {', '.join(DETECTORS)}")


def _check_device(name: str) -> None:
    """Raise ValueError where torch has no such device."""
    import torch

    try:
        device = torch.device(name)
        # CUDA is only counted: a tensor there would take memory for the life of a process that may just plan.
        if device.type != "cuda" or (device.index or 0) >= torch.cuda.device_count():
            torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        here, reason, remedy = ["cpu"], "", "use --device cpu"
        if (kind := torch.accelerator.current_accelerator()) is not None:
            here += [f"{kind}:{index}" for index in range(torch.accelerator.device_count())]
        if name.partition(":")[0] == "cuda":  # of other devices torch says nothing to the point
            reason = f" ({str(error).splitlines()[0].partition('. ')[0]})"
            if not torch.backends.cuda.is_built():
                remedy = f"install a CUDA build of torch (https://pytorch.org/get-started), or {remedy}"
        raise UserError(f"there is no torch device {name!r}{reason}, only {', '.join(here)}: {remedy}") from error
