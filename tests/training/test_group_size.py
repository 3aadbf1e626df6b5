"""How many runs train together: what measuring chooses, for machines whose speeds are given."""

import pytest

from cruijff_kit.training.group_size import GroupSizeTuner


def rounds(
    size: GroupSizeTuner, seconds: dict[int, float], runs: int, noise=lambda number: 1.0, count: int = 100
) -> list[int]:
    """The sizes of some rounds, where a token takes so long in groups of each size."""
    seen = []
    for number in range(count):
        asking = min(size.concurrency, runs)
        seen.append(size.choose_size(asking))
        size.record(seen[-1], 100 * asking * seconds[seen[-1]] * noise(number), 100 * asking)
    return seen


FASTER = {1: 1.0, 2: 0.8, 4: 0.7, 8: 0.68, 16: 0.66}


@pytest.mark.parametrize(
    ("seconds", "runs", "best", "why"),
    [
        (FASTER, 16, 16, "16 is the maximum"),
        (FASTER, 5, 5, "5 is the maximum"),
        (FASTER | {8: 0.9}, 16, 4, "with 8 at a time a token took 1.29 times as long as with 4"),
        ({1: 1.0, 2: 1.2}, 8, 1, "with 2 at a time a token took 1.20 times as long as with 1"),
        ({1: 1.0, 2: 1.0, 4: 0.99, 8: 0.985}, 8, 1, "8 is the maximum"),
        ({1: 1.0, 2: 1.03, 4: 0.8, 8: 0.79}, 8, 4, "8 is the maximum"),
    ],
)
def test_the_fastest_size_is_chosen(seconds, runs, best, why):
    size = GroupSizeTuner(runs, measured=True)
    seen = rounds(size, seconds | {5: 0.6}, runs)
    assert (size.best, size.why) == (best, why)
    assert set(seen[-10:]) == {best} and size.concurrency == best
    assert seen[0] == 1, "nothing is taken for granted"
    data = size.to_dict()
    assert data["size"] == best and data["measured"][0] == {"size": 1, "seconds_per_1000_tokens": 1000.0}


def test_a_busy_machine_does_not_decide():
    """Something beside takes half of the machine, from the middle of a comparison on; single rounds are interrupted."""

    def noise(number: int) -> float:
        return (2.0 if number >= 9 else 1.0) * (5.0 if number in (3, 13, 22) else 1.0)

    size = GroupSizeTuner(8, measured=True)
    rounds(size, FASTER, 8, noise)
    assert size.best == 8


def test_what_was_too_slow_is_tried_again_ever_less_often():
    size = GroupSizeTuner(8, measured=True)
    seen = rounds(size, {1: 1.0, 2: 1.2}, 8, count=1000)
    at = [n for n, s in enumerate(seen) if s == 2]
    begins = [n for n, before in zip(at[1:], at, strict=False) if n - before > 10]
    assert [b // 64 for b in begins] == [1, 3, 7, 15] and len(at) == 5 * 3
    rounds(size, FASTER, 8, count=1200)
    assert size.best == 8


def test_a_later_search_counts_when_it_has_ended():
    """The first ends with 1, the second is at 2 when it looks at 4: until it ends, 1 is the size, and then it says so."""
    tuner = GroupSizeTuner(8, measured=True)
    rounds(tuner, {1: 1.0, 2: 1.2}, 8, count=20)
    assert tuner.to_dict()["size"] == 1
    news = []
    for _ in range(200):
        size = tuner.choose_size(8)
        has_news = tuner.record(size, {1: 1.0, 2: 0.8, 4: 0.9}[size] * 800, 800)
        news += [tuner.to_dict()["size"]] if has_news else []
        assert tuner.to_dict()["size"] == (news or [1])[-1]
    assert news == [2]


def test_short_rounds_are_measured_more_often():
    size = GroupSizeTuner(2, measured=True)
    seen = rounds(size, {1: 1e-4, 2: 0.8e-4}, 2)
    assert seen.index(2) == 1 and seen[9:11] == [2, 2] and seen[:10].count(1) == 5


def test_memory_ends_the_search():
    size = GroupSizeTuner(16, measured=True, fits_in_memory=lambda now, then: then <= 4)
    rounds(size, FASTER, 16)
    assert size.best == 4 and size.why == "memory suffices for 4 at a time, not for 8"
    size = GroupSizeTuner(16, measured=True)
    rounds(size, FASTER, 16, count=15)
    assert size.concurrency == 8
    size.reduce_below(8)
    rounds(size, FASTER, 16)
    assert size.best == 4 and size.why == "memory ran out with 8 at a time"


def test_a_number_is_taken_as_it_is():
    size = GroupSizeTuner(3)
    assert rounds(size, {3: 1.0}, 3, count=5) == [3] * 5
    assert size.to_dict() == {"size": 3, "why": "multi_lora=3", "measured": []}
    size.reduce_below(3)
    assert size.best == 1


def test_a_resumed_group_keeps_its_size():
    size = GroupSizeTuner(8, measured=True)
    assert size.tuned_size is None
    size.restore(4)
    assert (size.best, size.tuned_size, size.concurrency) == (4, 4, 4)
    size.restore(2)
    assert size.best == 4
    number = GroupSizeTuner(3)
    number.restore(8)
    assert number.best == 3
