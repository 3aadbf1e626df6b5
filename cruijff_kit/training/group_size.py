"""How many runs of a pack go through the model together: as many as was said, or as many as measuring finds best.

A round is one pass of every run that is under way, in groups of some size. Rounds of two sizes take turns; what counts is
the ratio of neighbours' times for a token, so that a machine that is busy for a while does not decide. Sizes double as long
as this costs no time and there is memory for more. What was too slow is tried again later, ever less often.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

MOST = 32
"""Runs that are tried together at most."""
_ROUNDS, _MOST_ROUNDS = 3, 5  # of each of two sizes that are compared,
_SECONDS = 0.4  # as they take less or more than this
_GAIN = 0.98  # a larger size is chosen if it takes at most this share of the time,
_LOSS = 1.05  # and a still larger one is tried unless it takes more than this
_PAUSE = 64  # rounds until what took more is tried again


class PackSize:
    """Runs in one pass.

    Args:
        most: not more than these.
        measured: begin with one and find the best; else `most` from the beginning.
        room: whether there is memory for so many runs under way (second argument), where there are so many (first) now.
    """

    def __init__(
        self, most: int, measured: bool = False, room: Callable[[int, int], bool] = lambda now, then: True
    ) -> None:
        self.best, self.most, self.room = (1 if measured else most), most, room
        self.why = "" if measured else f"multi_lora={most}"
        self.seconds: dict[int, float] = {}
        """For 1000 tokens, by size: medians."""
        self._pair = (1, 2) if measured and most > 1 else None
        self._relative = {1: 1.0}  # time for a token, by size
        self._times: dict[int, list[tuple[float, int]]] = {}
        self._pause, self._rest = _PAUSE, 0

    @property
    def under_way(self) -> int:
        """Runs that should be under way."""
        return self._pair[1] if self._pair else self.best

    def of_round(self, asking: int) -> int:
        """The size of the next round's groups, where so many runs ask for a pass."""
        if self._pair is None and self._rest:
            self._rest -= 1
            if not self._rest:
                self._compare(self.best)
        if self._pair is None or asking < self._pair[1]:
            return self.best
        return min(self._pair, key=lambda size: len(self._times.get(size, [])))

    def note(self, size: int, seconds: float, tokens: int) -> bool:
        """What a round took; True when this ends the search, with another size than before or for the first time."""
        if self._pair is None or size not in self._pair:
            return False
        self._times.setdefault(size, []).append((seconds, tokens))
        if not all(self._enough(s) for s in self._pair):
            return False
        small, large = self._pair
        rates = {s: [seconds / tokens for seconds, tokens in self._times[s]] for s in self._pair}
        self.seconds |= {s: round(1000 * median(rates[s]), 6) for s in self._pair}
        ratio = median(b / a for a, b in zip(rates[small], rates[large], strict=False))
        self._relative[large] = self._relative[small] * ratio
        before, first = self.best, not self.why
        if self._relative[large] < _GAIN * self._relative[self.best]:
            self.best = large
        then = min(2 * large, self.most)
        if ratio > _LOSS:
            self._settle(f"with {large} at a time a token took {ratio:.2f} times as long as with {small}")
            self._rest, self._pause = self._pause, 2 * self._pause
        elif large == self.most:
            self._settle(f"{large} are the most")
        elif not self.room(large, then):
            self._settle(f"memory lasts for {large} at a time, not for {then}")
        else:
            self._compare(large)
        return self._pair is None and (first or self.best != before)

    @property
    def settled(self) -> int | None:
        """What was found; None while it is searched for."""
        return None if self._pair else self.best

    def go_on_with(self, size: int) -> None:
        """What was found before an interruption holds, unless this search has begun."""
        if self._pair is not None and not self._times and not self.seconds:
            self.best = min(size, self.most)
            self._settle("as before it was interrupted")

    def out_of_memory(self, size: int) -> None:
        """So many at once were too many."""
        self.most = max(1, size // 2)
        self.best = min(self.best, self.most)
        if self._pair is not None or self.best == self.most:
            self._settle(f"memory ran out with {size} at a time")
        self._rest = 0

    def as_data(self) -> dict[str, Any]:
        """As result.json has it: how many, why, and what was measured."""
        measured = [{"size": size, "seconds_per_1000_tokens": t} for size, t in sorted(self.seconds.items())]
        return {"size": self.best, "why": self.why, "measured": measured}

    def in_words(self) -> str:
        """What was chosen and why, in a line."""
        times = ", ".join(f"{size}: {t:.3g}" for size, t in sorted(self.seconds.items()))
        return f"{self.best} at a time ({self.why}; seconds for 1000 tokens by number at a time: {times})"

    def _enough(self, size: int) -> bool:
        rounds = self._times.get(size, [])
        long = sum(seconds for seconds, _ in rounds) >= _SECONDS
        return len(rounds) >= _MOST_ROUNDS or (long and len(rounds) >= _ROUNDS)

    def _compare(self, small: int) -> None:
        self._pair, self._times = (small, min(2 * small, self.most)), {}

    def _settle(self, why: str) -> None:
        self.why, self._pair = why, None
