import contextlib
import os
import pickle
import pickletools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lipprep.stages.landmarks import unpickle
from lipprep.stages.landmarks.unpickle import PickleRefusedError, load_pickle


def same(a, b):
    if isinstance(a, np.ndarray):
        assert isinstance(b, np.ndarray) and a.dtype == b.dtype and a.shape == b.shape
        for x, y in zip(a.ravel().tolist(), b.ravel().tolist(), strict=True):
            same(x, y)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            same(x, y)
    else:
        assert a == b


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(protocol):
    points = np.arange(136, dtype=np.float32).reshape(68, 2)
    rows = np.empty((2, 1), object)
    rows[:, 0] = [{"id": 1, "facial_landmarks": points}, None]
    data = [points, np.asfortranarray(points), points.astype(">f8"), points.astype(np.int32), points > 3, None, rows]
    data += [{"a": (1, 2.5, "x", True), "b": [points, points]}, np.array([], np.float64), b"\x00\xff"]
    same(load_pickle(pickle.dumps(data, protocol)), data)
    assert load_pickle(pickle.dumps([np.float32(1.5), np.int64(7), np.bool_(True)], protocol)) == [1.5, 7, True]


def test_python_2_and_both_names_of_numpys_core():
    raw = np.array([1.5, -2], "<f8").tobytes()
    # As Python 2 wrote it: protocol 2, numpy.core, the bytes as a string.
    content = (
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85"
        b"cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x10"
        + raw
        + b"tb."
    )
    for core in (b"numpy.core", b"numpy._core"):
        np.testing.assert_array_equal(load_pickle(content.replace(b"numpy.core", core)), [1.5, -2])


class Call:
    """Pickles as a call of `function`, made when the pickle is read."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def as_global(module, name):
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n"


# Each would make the file MARKER if it ran.
HOSTILE = {
    "os.system": lambda marker: pickle.dumps(Call(os.system, f"touch {marker}")),
    "inside an array": lambda marker: pickle.dumps(np.array([Call(os.system, f"touch {marker}")], object)),
    "inside a dict key": lambda marker: pickle.dumps([{1: [(Call(os.system, f"touch {marker}"),)]}]),
    "builtins.eval": lambda marker: pickle.dumps(Call(eval, f"open({str(marker)!r}, 'w')")),
    "builtins.getattr": lambda marker: pickle.dumps(Call(getattr, "x", "join")),
    "open": lambda marker: pickle.dumps(Call(open, str(marker), "w")),
    "numpy.save": lambda marker: pickle.dumps(Call(np.save, str(marker), np.zeros(1))),
    "numpy.load": lambda marker: as_global("numpy", "load") + b"(V" + str(marker).encode() + b"\ntR.",
    "numpy through a dotted name": lambda marker: b"\x80\x04\x8c\x05numpy\x8c\x0bndarray.dump\x93\x8c\x01x" + b"\x85R.",
    "functools.partial": lambda marker: (
        as_global("functools", "partial") + b"(" + as_global("posix", "system") + b"V" + str(marker).encode() + b"\ntR."
    ),
    "f2py": lambda marker: as_global("numpy.f2py", "main") + b")R.",
    "INST": lambda marker: b"(Vtouch " + str(marker).encode() + b"\niposix\nsystem\n.",
    "OBJ": lambda marker: b"(" + as_global("posix", "system") + b"Vtouch " + str(marker).encode() + b"\no.",
    "NEWOBJ": lambda marker: b"\x80\x02" + as_global("subprocess", "Popen") + b"(Vtouch\ntq\x00\x81.",
    "persistent id": lambda marker: b"Pname\n.",
    "extension": lambda marker: b"\x80\x02\x82\x01.",
    "state of a global": lambda marker: as_global("numpy", "ndarray") + b"N}V__call__\nNs\x86b.",
    "a bare global": lambda marker: as_global("numpy", "ndarray") + b".",
    "a bare dtype": lambda marker: pickle.dumps(np.dtype("f4")),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_nothing_is_run(case, tmp_path):
    marker = tmp_path / "ran"
    with pytest.raises(PickleRefusedError):
        load_pickle(HOSTILE[case](marker))
    assert list(tmp_path.iterdir()) == []


def test_the_refused_global_is_named():
    with pytest.raises(PickleRefusedError, match="system"):
        load_pickle(pickle.dumps([Call(os.system, "true")]))


def array_pickle(*, shape, dtype_state, code, data):
    """A pickle of one array, its parts chosen freely."""
    body = b"\x80\x02" + as_global("numpy.core.multiarray", "_reconstruct") + as_global("numpy", "ndarray")
    body += b"K\x00\x85C\x01b\x87R(K\x01" + strip(shape) + as_global("numpy", "dtype")
    body += b"X" + len(code).to_bytes(4, "little") + code.encode() + b"K\x00K\x01\x87R" + strip(dtype_state)
    return body + b"b\x89" + strip(data) + b"tb."


def strip(value):
    """The opcodes that push a value, without header and STOP."""
    return pickletools.optimize(pickle.dumps(value, 3))[2:-1]


PLAIN = (3, "<", None, None, None, -1, -1, 0)


def test_dtype_tricks_are_refused():
    good = array_pickle(shape=(2,), dtype_state=PLAIN, code="f4", data=b"\x00" * 8)
    np.testing.assert_array_equal(load_pickle(good), np.zeros(2, np.float32))
    bad = [
        {"code": "O8", "dtype_state": (3, "|", None, None, None, -1, -1, 63)},  # raw bytes as object pointers
        {"code": "V8", "dtype_state": (3, "|", None, None, None, 8, 1, 63)},
        {"code": "V8", "dtype_state": (3, "|", None, ("a",), {"a": (1, 0)}, 8, 1, 27)},
        {"dtype_state": (3, "<", (1, (2,)), None, None, -1, -1, 0)},
        {"dtype_state": (3, "?", None, None, None, -1, -1, 0)},
        {"code": "f4,O"},
        {"shape": (3,)},  # more than the bytes hold
        {"shape": (-1,), "data": [1, 2], "code": "O8"},
        {"shape": (2**60,), "data": [1, 2], "code": "O8"},
        {"shape": ("x",)},
    ]
    for change in bad:
        parts = {"shape": (2,), "dtype_state": PLAIN, "code": "f4", "data": b"\x00" * 8} | change
        with pytest.raises(PickleRefusedError):
            load_pickle(array_pickle(**parts))


def test_memory_is_bounded():
    doubled = []
    for _ in range(60):
        doubled = [doubled, doubled]  # 2**60 leaves, a few hundred bytes of pickle
    load_pickle(pickle.dumps(doubled))
    endless = []
    endless.append(endless)
    with pytest.raises(PickleRefusedError):
        load_pickle(pickle.dumps(endless))
    for content in (b"Nr\xff\xff\xff\x7f.", b"\x80\x04\x8e" + (2**62).to_bytes(8, "little") + b"."):
        with pytest.raises(PickleRefusedError):
            load_pickle(content)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_landmarks_as_lists_of_numbers_are_within_the_bounds(protocol):
    frames = [[[float(t), float(n)] for n in range(68)] for t in range(300)]
    same(load_pickle(pickle.dumps(frames, protocol)), frames)
    persons = np.array(
        [[{"id": n, "facial_landmarks": np.ones((68, 2))} for n in range(3)] for _ in range(300)], object
    )
    same(load_pickle(pickle.dumps(persons, protocol)), persons)


@pytest.mark.parametrize("made", [b"]" * 1001, b"]" + b"\x94" * 1002, b"N0" * 5001])
def test_more_than_landmarks_need_is_refused(made, monkeypatch):
    monkeypatch.setattr(unpickle, "MAX_CONTAINERS", 1000)
    monkeypatch.setattr(unpickle, "MAX_STEPS", 10_000)
    with pytest.raises(PickleRefusedError, match="more than"):
        load_pickle(b"\x80\x04(" + made + b"l.")


def shared_tuples(depth):
    """A tuple of 2**depth leaves: its hash takes as many steps, its pickle a few bytes a level."""
    nested = ("a",)
    for _ in range(depth):
        nested = (nested, nested)
    return nested


def pushed(depth):
    """The opcodes that push shared_tuples(depth), by DUP instead of the memo."""
    return b"K\x01" + b"2\x86" * depth


NESTED = pickletools.optimize(pickle.dumps(shared_tuples(60), 2))[2:-1]


@pytest.mark.parametrize(
    "content",
    [
        b"}" + NESTED + b"Ns.",
        b"}(K\x01N" + NESTED + b"Nu.",
        b"(K\x01N" + NESTED + b"Nd.",
        NESTED + b"q\x7f}h\x7fNs.",  # by way of the memo
        b"\x80\x04" + NESTED + b"\x940}h" + bytes([NESTED.count(b"q")]) + b"Ns.",
        b"}" + pushed(60) + b"Ns.",
        b"}(0" + pushed(60) + b"Ns.",  # a mark taken back
        b"\x80\x04\x8f(" + NESTED + b"\x90.",  # sets, too
        b"\x80\x04(" + NESTED + b"\x91.",
        pickle.dumps({(): 1}),
    ],
)
def test_only_plain_keys_are_hashed(content):
    with pytest.raises(PickleRefusedError, match=r"key|set"):  # within a lifetime
        load_pickle(content)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_keys_and_shared_values_are_read(protocol):
    key = "facial_landmarks"
    data = [{key: 1, 2: shared_tuples(3), 2.5: None, None: 1, True: 0, 2**70: 1, -1: 2}, {key: (key, {key: key})}, {}]
    same(load_pickle(pickle.dumps(data, protocol)), data)
    load_pickle(pickle.dumps(shared_tuples(60), protocol))


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(content):
    for start in (b"", b"\x80\x04", b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n"):
        with contextlib.suppress(PickleRefusedError):
            load_pickle(start + content)


@pytest.mark.parametrize("cut", range(0, 600, 37))
def test_a_cut_pickle_is_refused(cut):
    content = pickle.dumps([np.ones((68, 2), np.float32), None])
    with pytest.raises(PickleRefusedError):
        load_pickle(content[:cut])
