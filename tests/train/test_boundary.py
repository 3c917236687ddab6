import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lipprep.train.boundary import FORMULAS, boundary_vectors, word_frames

UNKNOWN = np.full((1, 2), np.nan)


# The frames that the published codes set to one in 29, of words of these durations.
@pytest.mark.parametrize(
    ("seconds", "mpc001", "vipl"), [(0.27, [10, 18], [11, 17]), (0.35, [9, 19], [10, 18]), (0.53, [7, 21], [7, 21])]
)
def test_the_formulas_are_the_published_ones(seconds, mpc001, vipl):
    for formula, expected in (("mpc001", mpc001), ("vipl", vipl)):
        frames = word_frames(formula, np.array([29]), np.array([seconds]), UNKNOWN, fps=25)
        assert frames.tolist() == [expected]


def test_times_are_where_the_word_stands():
    times = np.array([[0.1, 0.38], [np.nan] * 2, [0.12, 0.28]])
    frames = word_frames("times", np.array([29, 29, 9]), np.full(3, 0.3), times, fps=25)
    assert frames.tolist() == [[2, 10], [0, 0], [3, 7]]
    vectors = boundary_vectors(frames, 12)
    assert vectors.dtype == torch.float32 and vectors.shape == (3, 12, 1)
    assert vectors[0, :, 0].tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0] and not vectors[1].any()


@given(
    st.sampled_from(list(FORMULAS)),
    st.integers(1, 200),
    st.floats(0, 1e12) | st.just(float("nan")),
    st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)) | st.just((float("nan"), 1.0)),
    st.sampled_from([25.0, 30.0, 100.0]),
)
def test_a_word_stays_in_its_clip_and_an_unknown_one_has_no_frames(formula, length, seconds, times, fps):
    ((first, stop),) = word_frames(formula, np.array([length]), np.array([seconds]), np.array([times]), fps=fps)
    assert 0 <= first <= length and 0 <= stop <= length
    if np.isnan(times[0] if formula == "times" else seconds):
        assert first == stop == 0
