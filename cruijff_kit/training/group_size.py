"""How many runs of a group go through the model together: a given number, or what measuring finds to be fastest.

A round is one pass of every run that trains, in passes of some size. Rounds of two sizes alternate; what counts is the
ratio of neighbours' times for a token, so that a machine that is busy for a while does not decide. Sizes double as long as
this costs no time and there is memory for more. A size that was too slow is tried again later, ever less often.
"""

from collections.abc import Callable
from statistics import median
from typing import Any

MAX_SIZE = 32
"""Most runs that are tried together."""
_ROUNDS, _MAX_ROUNDS = 3, 5  # of each of two sizes that are compared,
_SECONDS = 0.4  # as they take more or less than this
_GAIN = 0.98  # a larger size is chosen if it takes at most this share of the time,
_LOSS = 1.05  # and a still larger one is tried unless it takes more than this
_PAUSE = 64  # rounds until a size that took more is tried again


class GroupSizeTuner:
    """Chooses the number of runs in one pass.

    Args:
        most: the largest number.
        measured: start with one run and find the fastest size; else `most` from the beginning.
        fits_in_memory: whether memory that held so many runs at a time (first argument) holds so many (second).
    """

    def __init__(
        self, most: int, measured: bool = False, fits_in_memory: Callable[[int, int], bool] = lambda now, then: True
    ) -> None:
        self.best, self.most, self.fits_in_memory = (1 if measured else most), most, fits_in_memory
        self.why = "" if measured else f"multi_lora={most}"
        self.seconds: dict[int, float] = {}
        """Median for 1000 tokens, by size."""
        self._pair = (1, 2) if measured and most > 1 else None
        self._relative = {1: 1.0}  # time for a token, by size
        self._times: dict[int, list[tuple[float, int]]] = {}
        self._pause, self._rest = _PAUSE, 0
        self._chosen = None if measured else most  # where the last search ended

    @property
    def concurrency(self) -> int:
        """How many runs should train at the same time."""
        return self._pair[1] if self._pair else self.best

    def choose_size(self, num_runs: int) -> int:
        """Choose the size of the next round's passes, where so many runs wait for one."""
        if self._pair is None and self._rest:
            self._rest -= 1
            if not self._rest:
                self._compare(self.best)
        if self._pair is None or num_runs < self._pair[1]:
            return self.best
        return min(self._pair, key=lambda size: len(self._times.get(size, [])))

    def record(self, size: int, seconds: float, tokens: int) -> bool:
        """Record what a round took.

        Returns:
            Whether this ends the search, with another size than before or for the first time.
        """
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
        before = self._chosen
        if self._relative[large] < _GAIN * self._relative[self.best]:
            self.best = large
        then = min(2 * large, self.most)
        if ratio > _LOSS:
            self._settle(f"with {large} at a time a token took {ratio:.2f} times as long as with {small}")
            self._rest, self._pause = self._pause, 2 * self._pause
        elif large == self.most:
            self._settle(f"{large} is the maximum")
        elif not self.fits_in_memory(large, then):
            self._settle(f"memory suffices for {large} at a time, not for {then}")
        else:
            self._compare(large)
        return self._chosen != before

    @property
    def tuned_size(self) -> int | None:
        """The size that was found; None while the search goes on."""
        return None if self._pair else self.best

    def restore(self, size: int) -> None:
        """Take the size that was found before an interruption, unless this search has begun."""
        if self._pair is not None and not self._times and not self.seconds:
            self.best = min(size, self.most)
            self._settle("as before it was interrupted")

    def reduce_below(self, size: int) -> None:
        """Choose at most half of a size that ran out of memory."""
        self.most = max(1, size // 2)
        self.best = min(self.best, self.most)
        if self._pair is not None or self.best == self.most:
            self._settle(f"memory ran out with {size} at a time")
        self._rest = 0

    def to_dict(self) -> dict[str, Any]:
        """The size, why it was chosen, and what was measured, as result.json has it."""
        measured = [{"size": size, "seconds_per_1000_tokens": t} for size, t in sorted(self.seconds.items())]
        return {"size": self._chosen or self.best, "why": self.why, "measured": measured}

    def summary(self) -> str:
        """Say in a line which size was chosen and why."""
        times = ", ".join(f"{size}: {t:.3g}" for size, t in sorted(self.seconds.items()))
        return f"{self.best} at a time ({self.why}; seconds for 1000 tokens by number at a time: {times})"

    def _enough(self, size: int) -> bool:
        rounds = self._times.get(size, [])
        long = sum(seconds for seconds, _ in rounds) >= _SECONDS
        return len(rounds) >= _MAX_ROUNDS or (long and len(rounds) >= _ROUNDS)

    def _compare(self, small: int) -> None:
        self._pair, self._times = (small, min(2 * small, self.most)), {}

    def _settle(self, why: str) -> None:
        self.why, self._pair, self._chosen = why, None, self.best
