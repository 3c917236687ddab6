"""Pickles of plain data, read without running anything.

The field publishes landmarks as pickles, and a pickle is a program. Here a pickle can name only the few globals
that arrays and bytes need, each replaced by a stand-in that notes its arguments. Real arrays are made
afterwards, from checked shapes and a short list of number types: numpy's own `dtype.__setstate__` would let a
stream pass raw bytes off as object pointers.
"""

import io
import math
import pickle
import pickletools
import re
from typing import Any

import numpy as np

from lipprep.io.errors import UserError

MAX_BYTES = 64 * 2**20  # far above any clip's landmarks; bounds what a hostile file can make us hold
MAX_CONTAINERS = 10**6  # 14,000 frames of 68 points, each a list of two numbers; a file of 6 kB can ask for millions
MAX_STEPS = 10**7  # opcodes: those frames take 7 million

_KNOWN = {
    **{
        (f"numpy.{core}.{module}", name): name
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",  # bytes below protocol 3
    ("__builtin__", "bytes"): "bytes",  # the same, where there are none
}
_NUMBER = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")
_OBJECT = re.compile(r"[|]?O[48]?")


_PUTS = {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_MAKES = {
    *("EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE", "LIST", "DICT", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"),
    *("REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"),
}
_SETS = {"EMPTY_SET", "ADDITEMS", "FROZENSET"}
# What opcodes say they push, where that is immutable and holds nothing.
_KEYS = {
    getattr(pickletools, f"py{kind}")
    for kind in (
        *("none", "bool", "int", "long", "integer_or_bool", "float"),
        *("string", "bytes", "bytes_or_str", "unicode"),
    )
}


class PickleRefusedError(UserError):
    """The bytes are no pickle of plain containers and arrays; the message says what was met."""


def load_pickle(content: bytes) -> Any:
    """Read a pickle of None, numbers, strings, lists, tuples, dicts and numpy arrays and scalars of these.

    Python 2's pickles are read too (their strings as latin-1). Arrays come back as numpy arrays, scalars as
    Python numbers. Raises PickleRefusedError for anything else, and names the global that was refused.
    """
    if len(content) > MAX_BYTES:
        raise PickleRefusedError(f"{len(content)} bytes; at most {MAX_BYTES} are read")
    try:
        _check_steps(content)
        return _plain(_Unpickler(io.BytesIO(content), encoding="latin1").load(), {})
    except PickleRefusedError:
        raise
    except Exception as error:  # a broken stream can raise anything; all of it means the same
        raise PickleRefusedError(f"not a pickle of plain data ({type(error).__name__}: {error})") from error


def _check_steps(content: bytes) -> None:
    """Follow a pickle's stack without its objects, and refuse what would never end or fill the memory.

    That is: more containers, memo entries or steps than landmarks need; lengths beyond the file; memo indices beyond
    the steps, as the unpickler allocates up to them; and keys other than plain ones, as the hash of tuples that hold
    one tuple twice, and so on, takes forever.
    """
    stack: list[pickletools.StackObject] = []  # what the opcodes say they push
    marks: list[int] = []
    memo: dict[int, pickletools.StackObject] = {}
    highest = count = made = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content), start=1):
        name, before = opcode.name, opcode.stack_before
        keys = []
        made += name in _MAKES
        if count > MAX_STEPS or max(made, len(memo)) > MAX_CONTAINERS:
            raise PickleRefusedError(f"more than {MAX_CONTAINERS} lists and other containers, or {MAX_STEPS} steps")
        if name in _SETS:
            raise PickleRefusedError("sets are not plain data")
        if name in _PUTS:
            index = len(memo) if argument is None else argument
            highest, memo[index] = max(highest, index), stack[-1]
        elif name in _GETS:
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        else:
            bottom = len(stack) - len(before)
            if pickletools.markobject in before:
                mark = marks.pop()
                bottom = mark - before.index(pickletools.markobject)
                keys = stack[mark::2] if name in ("DICT", "SETITEMS") else []
            elif name == "SETITEM":
                keys = stack[-2:-1]
            if bottom < 0:
                raise PickleRefusedError(f"step {count} takes more than there is")
            stack[bottom:] = opcode.stack_after
        if any(key not in _KEYS for key in keys):
            raise PickleRefusedError("a dict has a key that is neither a string nor a number")
    if highest > max(count, 255):
        raise PickleRefusedError(f"memo index {highest} in a pickle of {count} steps")


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> "_Global":
        try:
            return _Global(_KNOWN[module, name])
        except KeyError:
            raise PickleRefusedError(
                f"the pickle wants {module}.{name}, which is not plain data; it was not run"
            ) from None

    def persistent_load(self, pid: object) -> None:
        raise PickleRefusedError("the pickle refers to objects outside itself (a persistent id)")


class _Global(str):
    """A numpy function that a pickle may name. Immutable, so that no stream can change it for the next one."""

    __slots__ = ()

    def __call__(self, *arguments: Any) -> Any:
        match self, arguments:
            case "dtype", (str(code), *_):
                return _Dtype(code)
            case "_reconstruct", ("ndarray", *_):
                return _Array()
            case "_frombuffer", (data, _Dtype() as dtype, shape, "C" | "F" as order):
                array = _Array()
                array.__setstate__((1, shape, dtype, order == "F", data))
                return array
            case "scalar", (_Dtype() as dtype, data):
                return _numbers(dtype, data)[0].item()
            case "encode", (str(text), "latin1" | "latin-1"):
                return text.encode("latin1")
            case "bytes", ():
                return b""
        raise PickleRefusedError(f"the pickle calls numpy's {self} in a way that plain data does not need")


class _Dtype:
    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        if not (_NUMBER.fullmatch(code) or _OBJECT.fullmatch(code)):
            raise PickleRefusedError(f"arrays of type {code!r} are not read")
        self.code = code

    @property
    def is_object(self) -> bool:
        return bool(_OBJECT.fullmatch(self.code))

    def __setstate__(self, state: tuple) -> None:
        # (version, byte order, subarray, names, fields, ...)
        if state[1] not in ("<", ">", "=", "|") or any(part is not None for part in state[2:5]):
            raise PickleRefusedError("arrays of structured types are not read")
        if not self.is_object:
            self.code = state[1] + self.code.lstrip("<>=|")


class _Array:
    __slots__ = ("state",)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        if not (isinstance(dtype, _Dtype) and isinstance(shape, tuple) and all(type(n) is int for n in shape)):
            raise PickleRefusedError("an array without a plain shape and type")
        if dtype.is_object and not (isinstance(data, list) and len(data) == math.prod(shape)):
            raise PickleRefusedError(f"an array of shape {shape} without a list of as many objects")
        self.state = (shape, dtype, "F" if fortran else "C", data)


def _numbers(dtype: _Dtype, data: Any) -> np.ndarray:
    if dtype.is_object:
        raise PickleRefusedError("an object made of raw bytes")
    if isinstance(data, str):
        data = data.encode("latin1")
    return np.frombuffer(data, dtype=np.dtype(dtype.code))


def _plain(value: Any, done: dict[int, tuple[Any, Any]]) -> Any:
    """Replace the stand-ins in `value`; `done` keeps each object from being visited twice, and alive."""
    if value is None or type(value) in (bool, int, float, str, bytes, bytearray):
        return value
    if id(value) in done:
        return done[id(value)][1]
    match value:
        case _Array():
            shape, dtype, order, data = value.state
            if dtype.is_object:
                made = np.empty(len(data), object)
                for index, item in enumerate(data):
                    made[index] = _plain(item, done)
            else:
                made = _numbers(dtype, data)
            made = made.reshape(shape, order=order)
        case list() | tuple():
            made = type(value)(_plain(item, done) for item in value)
        case dict():
            made = {key: _plain(item, done) for key, item in value.items()}
        case _:
            raise PickleRefusedError(f"a bare {type(value).__name__.strip('_').lower()} is not plain data")
    done[id(value)] = (value, made)
    return made
