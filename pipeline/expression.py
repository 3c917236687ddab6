"""Conditions on figures, as `jitter < 2 and face_share > 0.9`: parsed, and never run as code."""

import ast
import difflib
import operator
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np

from lipprep.io.errors import UserError

_LONGEST = 2000  # characters: beyond it Python's parser may not come back
_LARGEST = 10**100
_COMPARE = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Eq: operator.eq, ast.NotEq: operator.ne,
}  # fmt: skip
_FORM = "compare figures and numbers with < <= > >= == != and join such with and, or, not and brackets"


@dataclass(frozen=True)
class Condition:
    """A condition that was understood, and the `names` of the figures in it."""

    text: str
    names: tuple[str, ...]
    _tree: ast.expr

    def holds(self, columns: Mapping[str, np.ndarray]) -> np.ndarray:
        """Where it holds, (N,) bool, and all figures in it are known; `columns` are the figures, (N,) float64."""
        known = np.logical_and.reduce([np.isfinite(columns[name]) for name in self.names])
        return known & _holds(self._tree, columns)


def parse_condition(text: str, known: Collection[str]) -> Condition:
    """Understand a condition on the figures called `known`.

    Raises ValueError, naming the part, for anything but comparisons of figures and numbers, joined by and, or and not.

    >>> parse_condition("jitter < 2 and not 0.5 < black", ["jitter", "black"]).names
    ('black', 'jitter')
    """
    if len(text) > _LONGEST:
        raise UserError(f"the condition has {len(text)} characters, at most {_LONGEST} are read")
    try:
        with warnings.catch_warnings(action="ignore"):  # of what is no condition anyway
            tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        reason = getattr(error, "msg", None) or str(error)
        raise UserError(f"the condition {text!r:.200} cannot be understood ({reason}): {_FORM}") from None
    names: set[str] = set()
    _check(tree, text, known, names, truth=True)
    if not names:
        raise UserError(f"the condition {text!r:.200} names no figure: it may name {', '.join(sorted(known))}")
    return Condition(text, tuple(sorted(names)), tree)


def _check(node: ast.expr, text: str, known: Collection[str], names: set[str], *, truth: bool) -> None:
    """Raise ValueError where a part is not what stands in its place: something true or false, or else a number."""
    match node:
        case ast.BoolOp() if truth:
            for value in node.values:
                _check(value, text, known, names, truth=True)
        case ast.UnaryOp(op=ast.Not()) if truth:
            _check(node.operand, text, known, names, truth=True)
        case ast.Compare() if truth and all(type(op) in _COMPARE for op in node.ops):
            for value in (node.left, *node.comparators):
                _check(value, text, known, names, truth=False)
        case ast.Name() if not truth:
            if node.id not in known:
                near = difflib.get_close_matches(node.id, known, 1)
                hint = f"did you mean {near[0]}? " if near else ""
                raise UserError(f"there is no figure {node.id!r:.60}: {hint}there are {', '.join(sorted(known))}")
            names.add(node.id)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd()) if not truth:
            _check(node.operand, text, known, names, truth=False)
        case ast.Constant(value=int() | float() as value) if not truth and value is not True and value is not False:
            if abs(value) > _LARGEST:
                raise UserError(f"{value!r:.40} is larger than any figure")
        case _:
            part = ast.get_source_segment(text.strip(), node) or text
            raise UserError(f"{part!r:.200} in the condition cannot be understood: {_FORM}")


def _holds(node: ast.expr, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    match node:
        case ast.BoolOp():
            join = np.logical_and if isinstance(node.op, ast.And) else np.logical_or
            return join.reduce([_holds(value, columns) for value in node.values])
        case ast.UnaryOp():
            return ~_holds(node.operand, columns)
        case ast.Compare():
            values = [_number(value, columns) for value in (node.left, *node.comparators)]
            compared = [_COMPARE[type(op)](values[n], values[n + 1]) for n, op in enumerate(node.ops)]
            return np.logical_and.reduce([np.broadcast_to(c, _shape(columns)) for c in compared])
    raise AssertionError(node)


def _number(node: ast.expr, columns: Mapping[str, np.ndarray]) -> np.ndarray:
    match node:
        case ast.Name():
            return columns[node.id]
        case ast.UnaryOp():
            value = _number(node.operand, columns)
            return -value if isinstance(node.op, ast.USub) else value
        case ast.Constant():
            return np.float64(float(node.value))
    raise AssertionError(node)


def _shape(columns: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    return next(iter(columns.values())).shape
