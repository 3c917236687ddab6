"""Why a clip could not be used: the classes that records, reports and `lipprep status` speak of."""

from lipprep.io.errors import UserError

FAILURES = {
    "unreadable": "the file is missing, empty, or neither a video nor crops",
    "truncated": "the file ends before its header says, or a frame cannot be decoded",
    "no_video": "the file has no video stream",
    "no_face": "no face in any frame",
    "too_short": "fewer frames than asked for",
    "too_long": "more frames than a clip, or its JPEG strip, can hold",
    "landmarks_missing": "the archive has no landmark file for the clip",
    "landmarks_mismatch": "landmarks and video have different numbers of frames",
    "bad_landmarks": "the landmark file is not one, or its points are not 68 (x, y) pairs",
    "bad_crops": "the file of crops holds none, or none of the set's size",
    "error": "lipprep or a library could not cope with it",
    "crashed": "the clip killed the process that worked on it",
    "timeout": "the clip took longer than allowed",
    "upstream": "an earlier stage failed",
}


class ClipFailure(UserError):
    """One clip cannot be used, for a reason that its record will state.

    `kind` is a class of FAILURES; the message names the cause and, where there is one, the remedy.
    """

    def __init__(self, kind: str, message: str) -> None:
        assert kind in FAILURES, kind
        super().__init__(message)
        self.kind = kind

    def __reduce__(self):  # exceptions with two arguments do not unpickle by themselves
        return type(self), (self.kind, str(self))


def check_class(kind: str) -> None:
    """Raise ValueError, naming those there are, for a class of failures that there is none of."""
    classes = [name for name in FAILURES if name != "upstream"]  # which always has another below it
    if kind not in classes:
        raise UserError(f"there is no class of failures {kind!r} (classes: {', '.join(classes)})")
