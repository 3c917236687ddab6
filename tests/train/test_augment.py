import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from lipprep.train.augment import AugmentedBatch, correct, cross_entropy, eval_batch, train_batch
from lipprep.train.draws import AugmentOptions, check_size, draw

NOTHING = {"flip": 0.0, "mixup": 0.0, "time_mask": 0, "variable_length": False}
UNKNOWN = float("nan")


def noise(batch_size=6, num_frames=9, size=20, seed=0):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.integers(0, 256, (batch_size, num_frames, size, size), dtype=np.uint8))


def augment(video, options, *, lengths=None, durations=UNKNOWN, fps=25.0, seed=0):
    return train_batch(video, drawn(video, options, lengths=lengths, durations=durations, fps=fps, seed=seed), options)


def drawn(video, options, *, lengths=None, durations=UNKNOWN, fps=25.0, seed=0):
    lengths = np.array(lengths) if lengths is not None else np.full(len(video), video.shape[1])
    durations = np.full(len(video), durations)
    return draw(lengths, durations, options, size=check_size(video, options), fps=fps, seed=(seed, 0))


def numbered_frames(batch_size, num_frames):
    """Clips of one pixel a frame whose value is the frame's number."""
    return torch.arange(num_frames, dtype=torch.uint8).expand(batch_size, num_frames)[:, :, None, None]


def plain(crop_size, **changed):
    """Options whose output is the pixel's own value."""
    return AugmentOptions(**{"crop_size": crop_size, "mean": 0.0, "std": 1 / 255, **NOTHING, **changed})


def assert_follows(drawn, probabilities):
    """Chi-square of the draws against the exact probabilities, at about five standard deviations."""
    counts = Counter(drawn)
    assert set(counts) <= set(probabilities)
    total = len(drawn)
    statistic = sum((counts[value] - total * p) ** 2 / (total * p) for value, p in probabilities.items())
    degrees = len(probabilities) - 1
    assert statistic < degrees + 5 * math.sqrt(2 * degrees) + 5


def test_evaluation_is_the_normalised_centre_crop_with_zero_padding():
    video, lengths = noise(3, 7, 20), torch.tensor([7, 4, 1])
    x = eval_batch(video, lengths, AugmentOptions(crop_size=12))
    assert x.shape == (3, 1, 7, 12, 12) and x.dtype == torch.float32
    for clip, length in enumerate(lengths):
        expected = (video[clip, :length, 4:16, 4:16].numpy() / 255 - 0.421) / 0.165
        np.testing.assert_allclose(x[clip, 0, :length], expected, atol=1e-5)
        assert not x[clip, 0, length:].any()


def test_with_everything_off_training_is_evaluation():
    video, lengths = noise(3, 7, 20), [7, 4, 1]
    options = AugmentOptions(crop_size=20, **NOTHING)
    batch = augment(video, options, lengths=lengths)
    assert batch.partner_B is None and (batch.share_B == 1).all()
    assert batch.lengths_B.tolist() == lengths
    torch.testing.assert_close(batch.x_B1THW, eval_batch(video, torch.tensor(lengths), options), rtol=0, atol=0)


def test_mean_frame_is_taken_over_valid_frames_in_training_and_evaluation():
    video, lengths = noise(2, 6, 12), [6, 3]
    options = AugmentOptions(crop_size=12, subtract_mean_frame=True, mean_frame_gain=2.0, **NOTHING)
    x = augment(video, options, lengths=lengths).x_B1THW
    for clip, length in enumerate(lengths):
        frames = video[clip, :length].numpy().astype(np.float64)
        expected = (frames - frames.mean(0)) / (255 * 0.165) * 2
        np.testing.assert_allclose(x[clip, 0, :length], expected, atol=1e-4)
        assert not x[clip, 0, length:].any()
    assert torch.equal(x, eval_batch(video, torch.tensor(lengths), options))


def test_crop_offsets_and_flip_are_uniform_and_shared_by_a_clips_frames():
    size, crop_size, batch_size = 12, 8, 4000
    video = torch.arange(size * size, dtype=torch.uint8).reshape(size, size).expand(batch_size, 2, size, size)
    x = augment(video, plain(crop_size, flip=0.3)).x_B1THW[:, 0].round().long()
    assert torch.equal(x[:, 0], x[:, 1])
    flipped = x[:, 0, 0, 0] > x[:, 0, 0, -1]
    x = torch.where(flipped[:, None, None], x[:, 0].flip(-1), x[:, 0])
    top, left = x[:, 0, 0] // size, x[:, 0, 0] % size
    expected = (top * size + left)[:, None, None] + (torch.arange(crop_size)[:, None] * size + torch.arange(8))
    assert torch.equal(x, expected)
    places = list(itertools.product(range(5), range(5)))
    assert_follows(list(zip(top.tolist(), left.tolist(), strict=True)), dict.fromkeys(places, 1 / 25))
    assert_follows(flipped.tolist(), {True: 0.3, False: 0.7})


@pytest.mark.parametrize(
    ("num_frames", "duration", "starts", "stops"),
    [
        (29, 0.40, range(9), range(20, 30)),  # h = 5, middle 14: [0, 8] and [20, 29]
        (29, 0.27, range(11), range(18, 30)),
        (29, 3.00, range(1), range(29, 30)),  # longer than the clip: all of it
        (10, 0.08, range(3), range(6, 11)),  # middle 4, h = 1
        (1, 0.10, range(1), range(1, 2)),
        (29, UNKNOWN, range(1), range(29, 30)),
    ],
)
def test_variable_length_cuts_as_defined(num_frames, duration, starts, stops):
    batch = augment(numbered_frames(5000, num_frames), plain(1, variable_length=True), durations=duration)
    x, lengths = batch.x_B1THW[:, 0, :, 0, 0].round().long(), batch.lengths_B
    assert x.shape[1] == lengths.max()
    valid = torch.arange(x.shape[1]) < lengths[:, None]
    assert torch.equal(x, torch.where(valid, x[:, :1] + torch.arange(x.shape[1]), 0))
    cuts = list(zip(x[:, 0].tolist(), (x[:, 0] + lengths).tolist(), strict=True))
    expected = [(start, stop) for start in starts for stop in stops]
    assert_follows(cuts, dict.fromkeys(expected, 1 / len(expected)))


def test_variable_length_starts_from_each_clips_own_length():
    video = numbered_frames(400, 29)
    batch = augment(video, plain(1, variable_length=True), lengths=[11] * 400, durations=0.1)
    last = batch.x_B1THW[:, 0, :, 0, 0].amax(1)
    assert batch.lengths_B.max() <= 11 and last.max() == 10


@pytest.mark.parametrize("length", [10, 3])
def test_time_mask_is_that_of_the_published_code(length):
    limit, batch_size = 5, 6000
    values = torch.tensor([3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26], dtype=torch.uint8)
    video = values.expand(batch_size, 12)[:, :, None, None]
    x = augment(video, plain(1, time_mask=limit), lengths=[length] * batch_size).x_B1THW[:, 0, :length, 0, 0]
    masked = (x - values[:length]).abs() > 1e-3
    mean = values[:length].float().mean().expand(int(masked.sum()))
    torch.testing.assert_close(x[masked], mean)
    widths = masked.sum(1)
    starts = masked.float().argmax(1)
    stretch = (torch.arange(length) >= starts[:, None]) & (torch.arange(length) < (starts + widths)[:, None])
    assert torch.equal(masked, stretch)
    probabilities = Counter()
    for spare, width in itertools.product(range(limit), repeat=2):
        places = range(length - spare) if 0 < spare < length and width else [None]
        for start in places:
            mask = (0, 0) if start is None else (min(width, length - start), start)
            probabilities[mask] += 1 / limit**2 / len(places)
    assert_follows(list(zip(widths.tolist(), starts.tolist(), strict=True)), probabilities)


def test_light_changes_each_clip_within_its_bounds():
    video = torch.tensor([0, 200], dtype=torch.uint8).repeat(3000, 1)[:, :, None, None]
    x = augment(video, plain(1, gain=0.3, bias=50.0)).x_B1THW[:, 0, :, 0, 0]
    bias, gain = x[:, 0], (x[:, 1] - x[:, 0]) / 200
    for drawn, low, high in ((gain, 0.7, 1.3), (bias, -50, 50)):
        deciles = ((drawn - low) / (high - low) * 10).floor().long().tolist()
        assert_follows(deciles, dict.fromkeys(range(10), 0.1))


def test_mixup_blends_the_batch_and_cuts_neither_clip():
    video, lengths = noise(6, 9, 12), [9, 2, 5, 7, 3, 1]
    mixed = augment(video, plain(12, mixup=0.4), lengths=lengths)
    x = augment(video, plain(12), lengths=lengths).x_B1THW
    assert sorted(mixed.partner_B.tolist()) == list(range(6))
    share = mixed.share_B[0]
    assert (mixed.share_B == share).all()
    torch.testing.assert_close(mixed.x_B1THW, share * x + (1 - share) * x[mixed.partner_B])
    own = torch.tensor(lengths)
    assert torch.equal(mixed.lengths_B, torch.maximum(own, own[mixed.partner_B]))
    for clip, length in zip(mixed.x_B1THW[:, 0], mixed.lengths_B, strict=True):
        assert not clip[length:].any()
    parts = [augment(video[:1], plain(12, mixup=0.4), seed=seed).share_B.item() for seed in range(300)]
    assert abs(np.mean(parts) - 0.5) < 0.08
    assert abs(np.var(parts) - 0.25 / 1.8) < 0.03  # of Beta(0.4, 0.4)


def test_loss_mixes_the_labels_as_the_clips():
    logits, labels = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 2, 1])
    batch = AugmentedBatch(torch.empty(0), torch.empty(0), torch.tensor([2, 0, 3, 1]), torch.full((4,), 0.3))
    one_hot = torch.eye(5)
    target = 0.3 * one_hot[labels] + 0.7 * one_hot[labels[batch.partner_B]]
    for smoothing in (0.0, 0.1):
        smoothed = target * (1 - smoothing) + smoothing / 5
        expected = -(smoothed * logits.log_softmax(1)).sum(1).mean()
        torch.testing.assert_close(cross_entropy(logits, labels, batch, smoothing), expected)
    alone = AugmentedBatch(torch.empty(0), torch.empty(0), None, torch.ones(4))
    expected = torch.nn.functional.cross_entropy(logits, labels)
    torch.testing.assert_close(cross_entropy(logits, labels, alone), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("partner", [None, torch.tensor([2, 0, 3, 1])])
def test_posteriors_are_not_normalised_again(smoothing, partner):
    frames_TBC = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).log_softmax(2)
    labels = torch.tensor([0, 4, 2, 2])
    batch = AugmentedBatch(torch.empty(0), torch.empty(0), partner, torch.full((4,), 0.3))
    # Of one frame, they are what a softmax leaves as it is; the mean of several is not.
    one, mean = frames_TBC[0], frames_TBC.mean(0)
    told = {"normalised": True, "label_smoothing": smoothing}
    torch.testing.assert_close(cross_entropy(one, labels, batch, **told), cross_entropy(one, labels, batch, smoothing))
    targets = torch.nn.functional.one_hot(labels, 5).float()
    if partner is not None:
        targets = 0.3 * targets + 0.7 * targets[partner]
    targets = (1 - smoothing) * targets + smoothing / 5
    expected = -(targets * mean).sum(1).mean()
    torch.testing.assert_close(cross_entropy(mean, labels, batch, **told), expected)
    assert expected > cross_entropy(mean, labels, batch, smoothing) + 0.01


EVERYTHING = AugmentOptions(
    crop_size=12, subtract_mean_frame=True, erasing=0.5, gain=0.3, scale=0.1, aspect=0.1, rotation=0.1, shift=0.1
)


@pytest.mark.parametrize("options", [AugmentOptions(crop_size=12), EVERYTHING])
def test_same_seed_same_bytes_and_zero_padding(options):
    first, again, other = (
        augment(noise(8, 15), options, lengths=[15, 9] * 4, durations=0.2, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first.x_B1THW, again.x_B1THW) and torch.equal(first.lengths_B, again.lengths_B)
    assert first.x_B1THW.shape != other.x_B1THW.shape or not torch.equal(first.x_B1THW, other.x_B1THW)
    for clip, length in zip(first.x_B1THW[:, 0], first.lengths_B, strict=True):
        assert clip[:length].abs().amax((1, 2)).all() and not clip[length:].any()


def test_each_step_is_drawn_anew_and_no_augmentation_changes_what_another_draws():
    lengths, durations = np.full(64, 29), np.full(64, 0.2)
    draws = [
        draw(lengths, durations, options, size=96, fps=25.0, seed=(1, step))
        for step, options in [(0, AugmentOptions()), (1, AugmentOptions()), (0, AugmentOptions(mixup=0, time_mask=0))]
    ]
    for name in ("starts", "lengths", "top", "left", "flipped"):
        first, other_step, fewer = (getattr(d, name) for d in draws)
        assert np.array_equal(first, fewer) and not np.array_equal(first, other_step)
    assert draws[2].partner is None and not draws[2].mask_widths.any()


@pytest.mark.parametrize("mixing", ["mixup", "cutmix"])
@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_of_a_batch_with_their_partners_are_parts_of_the_whole(parts, mixing):
    options = dataclasses.replace(EVERYTHING, **{"mixup": 0.0, mixing: 0.4})
    video, labels = noise(12, 15), torch.arange(12) % 5
    draws = drawn(video, options, lengths=[15, 9, 4] * 4, durations=0.2, seed=3)
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    whole, losses = train_batch(video, draws, options), []
    for own in np.split(np.arange(12), parts):
        rows = np.concatenate([own, np.setdiff1d(draws.partner[own], own)])
        part = train_batch(video[rows], draws, options, rows=rows, wanted=len(own))
        assert torch.equal(part.x_B1THW, whole.x_B1THW[own]) and torch.equal(part.lengths_B, whole.lengths_B[own])
        losses.append(cross_entropy(logits[own], labels[rows], part))
    torch.testing.assert_close(torch.stack(losses).mean(), cross_entropy(logits, labels, whole))


def test_affine_identity_is_the_plain_crop():
    video = noise(16, 4, 24)
    identity = augment(video, plain(15, flip=0.5, shift=1e-12)).x_B1THW
    torch.testing.assert_close(identity, augment(video, plain(15, flip=0.5)).x_B1THW, rtol=0, atol=2e-3)


def sampled_coordinates(**changed):
    """Where each pixel of each crop was taken from, (B, 2, crop, crop), read off two ramps."""
    ramp = torch.arange(96, dtype=torch.uint8).expand(96, 96)
    video = torch.stack((ramp, ramp.T)).expand(2000, 2, 96, 96)
    return augment(video, plain(33, **changed)).x_B1THW[:, 0]


@pytest.mark.parametrize(
    ("changed", "measure", "low", "high"),
    [
        ({"scale": 0.2}, lambda dx, dy: 1 / dx[:, 0], 0.8, 1.2),
        ({"scale": 0.2}, lambda dx, dy: 1 / dy[:, 1], 0.8, 1.2),
        ({"aspect": 0.1}, lambda dx, dy: dy[:, 1] / dx[:, 0], 0.9, 1.1),
        ({"rotation": 0.3}, lambda dx, dy: torch.atan2(dx[:, 1], dx[:, 0]), -0.3, 0.3),
        ({"rotation": 0.3}, lambda dx, dy: torch.atan2(-dy[:, 0], dy[:, 1]), -0.3, 0.3),
    ],
)
def test_affine_changes_are_those_of_their_names(changed, measure, low, high):
    coordinates = sampled_coordinates(**changed)
    # The steps in the source, in pixels, for one pixel to the right and one down in the crop.
    dx = coordinates[:, :, 16, 17] - coordinates[:, :, 16, 16]
    dy = coordinates[:, :, 17, 16] - coordinates[:, :, 16, 16]
    deciles = ((measure(dx, dy) - low) / (high - low) * 10).floor().long().clamp(0, 9).tolist()
    assert_follows(deciles, dict.fromkeys(range(10), 0.1))
    determinant = dx[:, 0] * dy[:, 1] - dx[:, 1] * dy[:, 0]
    if "scale" not in changed:
        torch.testing.assert_close(determinant, torch.ones(2000), rtol=0, atol=1e-3)


def test_shift_moves_the_crop_beyond_the_random_offset():
    plainly, shifted = sampled_coordinates(), sampled_coordinates(shift=0.2)
    moved = (shifted - plainly)[:, :, 16, 16]
    limit = 0.2 * 33 / 2
    assert moved.abs().max() <= limit + 1e-3 and (moved.abs().amax(0) > 0.95 * limit).all()


@pytest.mark.parametrize("function", ["train", "eval"])
def test_frames_smaller_than_the_crop_are_refused(function):
    video, options = noise(2, 3, 64), AugmentOptions()
    with pytest.raises(ValueError, match="crop_size"):
        if function == "train":
            augment(video, options)
        else:
            eval_batch(video, torch.tensor([3, 3]), options)


@pytest.mark.parametrize("wrong", [{"flip": 1.5}, {"std": 0}, {"mixup": -1}, {"time_mask": -3}, {"scale": 1.0}])
def test_impossible_options_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentOptions(**wrong)


def test_cutmix_takes_a_stretch_of_frames_from_the_partner():
    video, lengths = noise(6, 9, 12), [9, 2, 5, 7, 3, 1]
    x = augment(video, plain(12), lengths=lengths).x_B1THW[:, 0]
    cut_frames = 0
    for seed in range(40):
        cut = augment(video, plain(12, cutmix=1.0), lengths=lengths, seed=seed)
        assert cut.lengths_B.tolist() == lengths
        for clip, partner in enumerate(cut.partner_B.tolist()):
            own = (cut.x_B1THW[clip, 0] == x[clip]).flatten(1).all(1)
            others = (cut.x_B1THW[clip, 0] == x[partner]).flatten(1).all(1)
            assert (own | others).all()
            changed = (~own).nonzero()[:, 0].tolist()
            assert changed == list(range(changed[0], changed[0] + len(changed))) if changed else True
            assert len(changed) <= min(lengths[clip], lengths[partner])
            if partner != clip:
                assert cut.share_B[clip].item() == pytest.approx(1 - len(changed) / lengths[clip])
                cut_frames += len(changed)
    assert cut_frames


def test_cutmix_cuts_as_long_as_drawn_and_anywhere():
    draws = [drawn(noise(1, 5, 1), plain(1, cutmix=1.0), lengths=[5], seed=seed) for seed in range(4000)]
    # Beta(1, 1) is uniform: the ends of the rounded range get half as much as the widths between them.
    assert_follows([int(d.cut_widths[0]) for d in draws], {0: 0.1, 1: 0.2, 2: 0.2, 3: 0.2, 4: 0.2, 5: 0.1})
    assert_follows([int(d.cut_starts[0]) for d in draws if d.cut_widths[0] == 3], dict.fromkeys(range(3), 1 / 3))


def test_a_coin_decides_between_mixup_and_cutmix():
    options = plain(12, mixup=0.4, cutmix=1.0)
    cuts = [bool(drawn(noise(8, 9, 12), options, seed=seed).cut_widths.any()) for seed in range(400)]
    alone = [drawn(noise(8, 9, 12), plain(12, mixup=0.4), seed=seed) for seed in range(400)]
    both = [drawn(noise(8, 9, 12), options, seed=seed) for seed in range(400)]
    assert 0.4 < np.mean(cuts) < 0.6
    for cut, one, other in zip(cuts, alone, both, strict=True):
        assert cut or other.lam == 1 or (np.array_equal(one.partner, other.partner) and one.lam == other.lam)


def erased_by_definition(size, random):
    """One rectangle as Zhong et al. 2020 draw it, a sample at a time: top, left, height and width, or none."""
    for _ in range(10):
        area = size * size * random.uniform(0.02, 0.33)
        ratio = math.exp(random.uniform(math.log(0.3), math.log(3.3)))
        height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if height < size and width < size:
            return random.integers(0, size - height + 1), random.integers(0, size - width + 1), height, width
    return 0, 0, 0, 0


def test_erasing_follows_the_definition_sample_by_sample():
    count, size, random = 6000, 40, np.random.default_rng(5)
    video = torch.zeros((count, 1, size, size), dtype=torch.uint8)
    ours = drawn(video, plain(size, erasing=1.0)).erased
    theirs = np.array([erased_by_definition(size, random) for _ in range(count)])
    for column in range(4):
        edges = np.unique(np.quantile(theirs[:, column], np.linspace(0, 1, 11)))
        expected, found = (np.histogram(drawn_[:, column], edges)[0] for drawn_ in (theirs, ours))
        # Both are samples, so their difference has the variance of their sum.
        assert ((expected - found) ** 2 / (expected + found)).sum() < len(edges) + 5 * math.sqrt(2 * len(edges))
    some = drawn(video, plain(size, erasing=0.25)).erased
    assert 0.22 < (some[:, 2] > 0).mean() < 0.28


def test_erasing_blanks_one_rectangle_in_all_frames_and_nothing_else():
    video = noise(16, 5, 30).clamp(1)
    draws = drawn(video, plain(30, erasing=0.5))
    x = train_batch(video, draws, plain(30, erasing=0.5)).x_B1THW[:, 0]
    for clip, (top, left, height, width) in enumerate(draws.erased):
        blank = torch.zeros(30, 30, dtype=torch.bool)
        blank[top : top + height, left : left + width] = True
        assert torch.equal(x[clip] == 0, blank.expand(5, 30, 30))
        torch.testing.assert_close(x[clip][:, ~blank], video[clip][:, ~blank].float())


def test_without_random_crop_the_centre_is_cut():
    video = noise(8, 3, 20)
    assert torch.equal(augment(video, plain(12, random_crop=False)).x_B1THW[:, 0], video[:, :, 4:16, 4:16].float())


def test_a_batch_may_be_as_long_as_wanted():
    video, lengths = noise(3, 9, 12), [4, 2, 3]
    draws = drawn(video, plain(12), lengths=lengths)
    short, long = train_batch(video, draws, plain(12)), train_batch(video, draws, plain(12), frames=9)
    assert short.x_B1THW.shape[2] == 4 and long.x_B1THW.shape[2] == 9
    assert torch.equal(long.x_B1THW[:, :, :4], short.x_B1THW) and not long.x_B1THW[:, :, 4:].any()


def test_what_was_read_right_is_counted_as_it_is_mixed():
    logits, labels = torch.eye(3)[[0, 1, 1, 2]] * 5, torch.tensor([0, 0, 1, 2])
    alone = AugmentedBatch(torch.empty(0), torch.empty(0), None, torch.ones(4))
    assert correct(logits, labels, alone).item() == 0.75
    mixed = AugmentedBatch(torch.empty(0), torch.empty(0), torch.tensor([1, 2, 3, 0]), torch.tensor([0.9, 0.6, 0.7, 0]))
    # The first is read as its own and its partner's word, the second as its partner's, the last as none of both.
    assert correct(logits, labels, mixed).item() == pytest.approx((1 + 0.4 + 0.7 + 0) / 4)


@pytest.mark.parametrize("formula", ["mpc001", "vipl", "times"])
@pytest.mark.parametrize("mixing", [{}, {"mixup": 0.4}, {"cutmix": 1.0}], ids=lambda mixing: next(iter(mixing), "none"))
def test_boundaries_go_where_the_frames_of_the_words_go(formula, mixing):
    # White where the word is: what comes out is the boundary itself, where pixels and boundaries are mixed alike.
    lengths = np.array([12, 9, 12, 7, 10, 12])
    words = np.array([[3, 7], [0, 2], [5, 12], [6, 7], [0, 0], [2, 9]])
    places = np.arange(12)
    white = (places >= words[:, :1]) & (places < words[:, 1:])
    video = torch.from_numpy(np.where(white, 255, 0).astype(np.uint8))[:, :, None, None]
    options = plain(1, std=1.0, variable_length=True, **mixing)
    shortened = False
    for seed in range(20):
        draws = drawn(video, options, lengths=lengths, durations=0.08, seed=seed)
        out = train_batch(video, draws, options, words={formula: words})
        boundary = out.boundaries[formula]
        assert boundary.shape == (6, out.x_B1THW.shape[2], 1) and boundary.dtype == torch.float32
        pixels = out.x_B1THW[:, 0, :, 0, 0]
        shortened |= bool((draws.starts > 0).any())
        if "mixup" in mixing and formula != "vipl":  # each clip keeps its own
            alone = dataclasses.replace(draws, partner=None)
            pixels = train_batch(video, alone, options).x_B1THW[:, 0, :, 0, 0]
        torch.testing.assert_close(boundary[:, :, 0], pixels)
    assert shortened
