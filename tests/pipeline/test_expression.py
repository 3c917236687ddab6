import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lipprep.pipeline.expression import parse_condition

FIGURES = {"jitter": np.array([0.5, 2.0, np.nan, 3.0]), "black": np.array([0.0, 0.1, 0.0, 1.0])}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("jitter < 2", [True, False, False, False]),
        ("jitter <= 2 and black == 0", [True, False, False, False]),
        ("jitter > 1 or black > 0.5", [False, True, False, True]),
        ("not jitter < 1", [False, True, False, True]),
        ("not (jitter < 1 or black == 1)", [False, True, False, False]),
        ("0.1 <= black < 1", [False, True, False, False]),
        ("-1 < black and jitter != 3", [True, True, False, False]),
        ("black < jitter", [True, True, False, True]),
    ],
)
def test_conditions_hold_where_they_say_and_nowhere_where_a_figure_is_unknown(text, expected):
    condition = parse_condition(text, FIGURES)
    assert condition.holds(FIGURES).tolist() == expected
    assert set(condition.names) == {name for name in FIGURES if name in text}


@pytest.mark.parametrize(
    "text, said",
    [
        ("jiter < 2", "did you mean jitter"),
        ("colour < 2", "there are black, jitter"),
        ("jitter", "'jitter' in the condition"),
        ("1 < 2", "names no figure"),
        ("jitter < 'x'", "cannot be understood"),
        ("jitter < True", "True"),
        ("jitter < 1e999", "larger than any figure"),
        ("jitter < " + "9" * 1500, "larger than any figure"),
        ("__import__('os').system('true') < 1", "cannot be understood"),
        ("jitter.real < 1", "cannot be understood"),
        ("[jitter for jitter in black] < 1", "cannot be understood"),
        ("(lambda: 1)() < jitter", "cannot be understood"),
        ("jitter < 10 ** 10", "cannot be understood"),
        ("jitter <", "cannot be understood"),
        ("jitter < 1\0", "cannot be understood"),
        ("(" * 900 + "jitter < 1" + ")" * 900, "cannot be understood"),
        ("jitter < 1 and " * 200 + "jitter < 1", "at most 2000"),
        ("", "cannot be understood"),
    ],
)
def test_anything_else_is_refused_and_named(text, said):
    with pytest.raises(ValueError, match="(?s)" + said.replace("(", r"\(").replace("*", r"\*")):
        parse_condition(text, FIGURES)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="jiterblack<>=! 019.andorot()-+*[]{}'\\:@%\n", max_size=60))
def test_no_text_does_anything_but_hold_or_be_refused(text):
    try:
        held = parse_condition(text, FIGURES).holds(FIGURES)
    except ValueError:
        return
    assert held.shape == (4,) and held.dtype == bool
