import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lipprep.train.epoch import BLOCK, WINDOW, evaluation_plan, places, rank_rows, training_plan

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
    plan = evaluation_plan(places(counts), batch_size=batch_size)
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


@given(
    counts=COUNTS,
    world=st.integers(1, 64),
    share=st.integers(1, 8),
    workers=st.integers(0, 16),
    first=st.integers(0, 30),
    seed=st.integers(0, 99),
)
def test_ranks_and_workers_decide_only_who_reads(counts, world, share, workers, first, seed):
    batch_size = world * share
    plan = training_plan(counts, seed=seed, epoch=1, batch_size=batch_size, parts=world)
    went_on = plan[first:]  # as a run does that is resumed at batch `first`
    read: dict[int, list] = {}
    for rank in range(world):
        for worker in range(max(1, workers)):
            for number in range(worker, len(went_on), max(1, workers)):
                rows = rank_rows(len(went_on[number]), rank=rank, world=world)
                read.setdefault(number, []).append(went_on[number][rows])
    for number, parts in read.items():
        assert len({len(part) for part in parts}) == 1 and len(parts[0])
        assert sorted(as_set(parts)) == sorted(as_set([plan[first + number]]))
    assert len(read) == len(went_on)
    taken = as_set(plan)
    assert len(taken) == len(set(taken)) and sum(counts) - len(taken) < batch_size


@given(counts=COUNTS, world=st.integers(1, 64), batch_size=st.integers(1, 40))
def test_evaluation_on_ranks_takes_each_sample_once_and_repeats_the_last(counts, world, batch_size):
    total = sum(counts)
    plans = [evaluation_plan(places(counts), batch_size=batch_size, rank=rank, world=world) for rank in range(world)]
    assert len({tuple(map(len, plan)) for plan in plans}) == 1
    rows = [as_set(plan) for plan in plans]
    order = [rows[i % world][i // world] for i in range(world * len(rows[0]))]
    everything = as_set([places(counts)])
    assert order[:total] == everything and order[total:] == everything[-1:] * (len(order) - total)
