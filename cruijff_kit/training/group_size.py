"""Tune how many runs of a group share one pass: a given number, or the number that is measured to be fastest.

A round is one micro-batch of every run that trains, in passes of some size. Rounds of two sizes alternate, and the ratio of
consecutive rounds' times per token is compared, so that a machine that is busy for a while does not bias the choice. The
size doubles while this costs no time and memory suffices. A size that was too slow is tried again later, less and less
often.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

MAX_SIZE = 32
"""Maximum number of runs in one pass."""
_ROUNDS, _MAX_ROUNDS = 3, 5  # rounds per size in a comparison: 3 if they take _SECONDS in all, else 5
_SECONDS = 0.4
_GAIN = 0.98  # a larger size is chosen if its time per token is at most this share of the smaller size's,
_LOSS = 1.05  # and a still larger size is tried unless the ratio exceeds this
_PAUSE = 64  # rounds until a size that was too slow is tried again


class GroupSizeTuner:
    """Chooses the number of runs in one pass.

    Args:
        most: maximum number.
        measured: start with one run and measure the fastest size; else use `most` from the beginning.
        fits_in_memory: takes the number of runs in a pass until now and a larger number; returns whether the larger
            number fits in memory.
    """

    def __init__(
        self, most: int, measured: bool = False, fits_in_memory: Callable[[int, int], bool] = lambda now, then: True
    ) -> None:
        self.best, self.most, self.fits_in_memory = (1 if measured else most), most, fits_in_memory
        self.why = "" if measured else f"multi_lora={most}"
        self.seconds: dict[int, float] = {}
        """Size -> median seconds per 1000 tokens."""
        self._pair = (1, 2) if measured and most > 1 else None
        self._relative = {1: 1.0}  # size -> time per token relative to size 1
        self._times: dict[int, list[tuple[float, int]]] = {}
        self._pause, self._rest = _PAUSE, 0
        self._chosen_size = None if measured else most  # result of the last search

    @property
    def concurrency(self) -> int:
        """Return how many runs should train at the same time."""
        return self._pair[1] if self._pair else self.best

    def choose_size(self, num_runs: int) -> int:
        """Choose the size of the next round's passes, if `num_runs` runs wait for a pass."""
        if self._pair is None and self._rest:
            self._rest -= 1
            if not self._rest:
                self._compare(self.best)
        if self._pair is None or num_runs < self._pair[1]:
            return self.best
        return min(self._pair, key=lambda size: len(self._times.get(size, [])))

    def record(self, size: int, seconds: float, tokens: int) -> bool:
        """Record the time of a round.

        Returns:
            Whether this round ends the search with a size that differs from the previous search's.
        """
        if self._pair is None or size not in self._pair:
            return False
        self._times.setdefault(size, []).append((seconds, tokens))
        if not all(self._has_enough_rounds(s) for s in self._pair):
            return False
        small, large = self._pair
        rates = {s: [seconds / tokens for seconds, tokens in self._times[s]] for s in self._pair}
        self.seconds |= {s: round(1000 * median(rates[s]), 6) for s in self._pair}
        ratio = median(b / a for a, b in zip(rates[small], rates[large], strict=False))
        self._relative[large] = self._relative[small] * ratio
        previous_size = self._chosen_size
        if self._relative[large] < _GAIN * self._relative[self.best]:
            self.best = large
        larger = min(2 * large, self.most)
        if ratio > _LOSS:
            self._settle(f"with {large} at a time a token took {ratio:.2f} times as long as with {small}")
            self._rest, self._pause = self._pause, 2 * self._pause
        elif large == self.most:
            self._settle(f"{large} is the maximum")
        elif not self.fits_in_memory(large, larger):
            self._settle(f"memory suffices for {large} at a time, not for {larger}")
        else:
            self._compare(large)
        return self._chosen_size != previous_size

    @property
    def tuned_size(self) -> int | None:
        """Return the size that was measured to be fastest; None during the search."""
        return None if self._pair else self.best

    def restore(self, size: int) -> None:
        """Restore the size of a checkpoint, unless the search has begun."""
        if self._pair is not None and not self._times and not self.seconds:
            self.best = min(size, self.most)
            self._settle("as before it was interrupted")

    def reduce_below(self, size: int) -> None:
        """Limit the size to half of one that ran out of memory."""
        self.most = max(1, size // 2)
        self.best = min(self.best, self.most)
        if self._pair is not None or self.best == self.most:
            self._settle(f"memory ran out with {size} at a time")
        self._rest = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the size, the reason for it, and the measurements, for result.json."""
        measured = [{"size": size, "seconds_per_1000_tokens": t} for size, t in sorted(self.seconds.items())]
        return {"size": self._chosen_size or self.best, "why": self.why, "measured": measured}

    def summary(self) -> str:
        """Return one line: the size, the reason for it, and the measurements."""
        times = ", ".join(f"{size}: {t:.3g}" for size, t in sorted(self.seconds.items()))
        return f"{self.best} at a time ({self.why}; seconds for 1000 tokens by number at a time: {times})"

    def _has_enough_rounds(self, size: int) -> bool:
        rounds = self._times.get(size, [])
        is_long = sum(seconds for seconds, _ in rounds) >= _SECONDS
        return len(rounds) >= _MAX_ROUNDS or (is_long and len(rounds) >= _ROUNDS)

    def _compare(self, small: int) -> None:
        self._pair, self._times = (small, min(2 * small, self.most)), {}

    def _settle(self, why: str) -> None:
        self.why, self._pair, self._chosen_size = why, None, self.best
