import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage.transform import estimate_transform

from lipprep.stages.align import (
    PROFILES,
    apply,
    cut_corners,
    find_profile,
    mean_face,
    patch_matrices,
    repair,
    robust_similarity,
    similarity,
    smooth_centred,
    smooth_forward,
)
from lipprep.stages.failures import ClipFailure


def faces(T: int, seed: int = 0) -> np.ndarray:
    """T moving faces: the mean face, turned, scaled, shifted and a little deformed."""
    rng = np.random.default_rng(seed)
    t = np.arange(T)[:, None, None]
    angle = 0.1 * np.sin(t / 7)
    x, y = np.moveaxis(mean_face()[None] - 128, -1, 0)
    turned = np.stack(
        [np.cos(angle[..., 0]) * x - np.sin(angle[..., 0]) * y, np.sin(angle[..., 0]) * x + np.cos(angle[..., 0]) * y],
        -1,
    )
    return 1.1 * turned + 130 + 3 * np.sin(t / 5) + rng.normal(0, 0.5, (T, 68, 2))


def test_mean_face_is_the_published_one():
    face = mean_face()
    assert face.shape == (68, 2) and face.dtype == np.float64
    np.testing.assert_allclose(face[33], (128.87017960974802, 137.30253355584708), rtol=0)
    np.testing.assert_allclose(face.mean(0), (129.93093587, 129.22443543), atol=2e-5)


@given(st.integers(0, 2**31), st.integers(2, 12))
def test_similarity_is_umeyamas(seed, K):
    rng = np.random.default_rng(seed)
    src, dst = rng.uniform(0, 256, (3, K, 2)), rng.uniform(0, 256, (K, 2))
    for matrix, points in zip(similarity(src, dst), src, strict=True):
        reference = estimate_transform("similarity", points, dst).params
        # Umeyama's solution and the complex one are the same but for reflections, which neither allows.
        assert np.abs(apply(matrix[None], points[None])[0] - dst).sum() <= np.abs(
            (points @ reference[:2, :2].T + reference[:2, 2]) - dst
        ).sum() * (1 + 1e-6) + 1e-6 or np.allclose(matrix, reference[:2], atol=1e-6)


def test_similarity_recovers_a_known_transform():
    src = faces(9)
    matrix = np.array([[0.9, -0.2, 5.0], [0.2, 0.9, -7.0]])
    for t in range(9):
        dst = src[t] @ matrix[:, :2].T + matrix[:, 2]
        np.testing.assert_allclose(similarity(src[t : t + 1], dst)[0], matrix, atol=1e-9)


def test_robust_similarity_agrees_without_outliers_and_ignores_one():
    stable = [28, 33, 36, 39, 42, 45, 48, 54]
    src = faces(20)[:, stable]
    src += (similarity(src, mean_face()[stable])[:, :, 2] * 0)[:, None]
    plain, robust = similarity(src, mean_face()[stable]), robust_similarity(src, mean_face()[stable])
    assert np.abs(apply(plain, src) - apply(robust, src)).max() < 2
    src[:, 3] += 60
    assert np.abs(robust_similarity(src, mean_face()[stable]) - robust)[:, :, :2].max() < 0.1


def test_repair_interpolates_and_extends():
    points = faces(10).astype(np.float32)
    holes = points.copy()
    holes[[0, 1, 4, 5, 9]] = np.nan
    filled = repair(holes)
    np.testing.assert_allclose(filled[[2, 3, 6, 7, 8]], points[[2, 3, 6, 7, 8]])
    np.testing.assert_allclose(filled[0], points[2])
    np.testing.assert_allclose(filled[9], points[8])
    np.testing.assert_allclose(filled[4], points[3] + (points[6] - points[3]) / 3, rtol=1e-5)
    with pytest.raises(ClipFailure, match="no face"):
        repair(np.full((5, 68, 2), np.nan))


def test_smoothing_windows():
    points = np.arange(20.0)[:, None, None] * np.ones((1, 68, 2))
    np.testing.assert_allclose(smooth_forward(points)[:, 0, 0], np.arange(9) + 5.5)
    np.testing.assert_allclose(smooth_forward(points[:3])[:, 0, 0], [1.0])  # shrinks to a short clip
    np.testing.assert_allclose(smooth_centred(points), points)  # a line is its own centred mean
    wobble = points + np.random.default_rng(0).normal(0, 1, points.shape)
    np.testing.assert_allclose(smooth_centred(wobble).mean(1), wobble.mean(1))  # keeps the frame's centroid


@pytest.mark.parametrize("name", [n for n, p in PROFILES.items() if p.align])
@pytest.mark.parametrize("T", [1, 2, 5, 11, 12, 13, 29])
def test_every_profile_takes_any_length(name, T):
    matrices = patch_matrices(faces(T), find_profile(name), crop_size=96, face=mean_face(), frame_size=(256, 256))
    assert matrices.shape == (T, 2, 3) and np.isfinite(matrices).all()
    mouth = apply(matrices, faces(T))[:, 48:68].mean(1)
    assert np.abs(mouth - 48).max() < 3  # the mouth lies in the middle of the patch


def test_a_rigid_motion_of_the_head_leaves_the_aligned_patch_where_it_is():
    still = np.repeat(faces(1), 15, 0)
    moved = still * 1.2 + 11
    for name in ("lrw2021", "lrw2022"):
        ours = [apply(patch_matrices(p, find_profile(name), crop_size=96, face=mean_face()), p) for p in (still, moved)]
        np.testing.assert_allclose(*ours, atol=1e-3)


def test_corners_stay_inside_and_round_half_to_even():
    corners = cut_corners(np.array([[128.5, 129.5], [3.0, 300.0]]), 96, 256, 256)
    assert corners.tolist() == [[80.0, 82.0], [0.0, 160.0]]


def test_points_that_coincide_are_bad_landmarks():
    for name in ("lrw2021", "lrw2022"):
        with pytest.raises(ClipFailure) as error:
            patch_matrices(np.full((20, 68, 2), 100.0), find_profile(name), crop_size=96, face=mean_face())
        assert error.value.kind == "bad_landmarks"


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(ValueError, match="lrw2021, lrw2022"):
        find_profile("lrw1999")
