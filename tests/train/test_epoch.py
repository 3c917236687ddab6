import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lipprep.train.epoch import BLOCK, WINDOW, evaluation_plan, places, training_plan

COUNTS = st.lists(st.integers(0, 70), min_size=1, max_size=8)


def as_set(batches) -> list[tuple[int, int]]:
    return [tuple(place) for batch in batches for place in batch.tolist()]


@given(counts=COUNTS, seed=st.integers(0, 2**40), epoch=st.integers(0, 99), batch_size=st.integers(1, 40))
def test_training_takes_each_sample_at_most_once_in_equal_batches(counts, seed, epoch, batch_size):
    plan = training_plan(counts, seed=seed, epoch=epoch, batch_size=batch_size)
    taken, everything = as_set(plan), as_set([places(counts)])
    assert len(taken) == len(set(taken))
    assert set(taken) <= set(everything)
    if len(everything) < batch_size:
        assert set(taken) == set(everything)
        assert len(plan) == min(1, len(everything))
    else:
        assert [len(batch) for batch in plan] == [batch_size] * (len(everything) // batch_size)
    again = training_plan(counts, seed=seed, epoch=epoch, batch_size=batch_size)
    assert all(np.array_equal(a, b) for a, b in zip(plan, again, strict=True))


@given(counts=COUNTS, batch_size=st.integers(1, 40))
def test_evaluation_takes_each_sample_once_in_order(counts, batch_size):
    plan = evaluation_plan(counts, batch_size=batch_size)
    assert as_set(plan) == [(shard, i) for shard, count in enumerate(counts) for i in range(count)]
    assert all(len(batch) == batch_size for batch in plan[:-1])


def test_epochs_and_seeds_differ_in_order_and_in_what_they_leave_out():
    plans = [training_plan([100, 57], seed=s, epoch=e, batch_size=32) for s, e in [(0, 0), (0, 1), (1, 0)]]
    orders = [as_set(plan) for plan in plans]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert len({frozenset(order) for order in orders}) > 1


def test_reads_stay_inside_a_window_of_blocks_that_come_from_all_shards():
    counts = [512] * 40
    order = np.array(as_set(training_plan(counts, seed=3, epoch=0, batch_size=32)))
    for start in range(0, len(order), BLOCK * WINDOW):
        window = order[start : start + BLOCK * WINDOW]
        blocks = {(shard, position // BLOCK) for shard, position in window.tolist()}
        assert len(blocks) == WINDOW
        assert len({shard for shard, _ in blocks}) > 20


def test_neighbours_are_parted():
    order = np.array(as_set(training_plan([4096], seed=0, epoch=0, batch_size=32)))
    assert np.mean(np.abs(np.diff(order[:, 1])) == 1) < 0.02
