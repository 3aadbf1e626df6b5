"""How much of what differs between configurations goes with each setting, and whether anything differs at all.

The values are the configurations' (means over their seeds). Two things move them beside the settings: other seeds, whose
variance is that of the runs inside configurations, pooled; and other test items, the same for all configurations. With
neither known nothing is decomposed.

Settings are separated by the rank of the design, not by how a sweep was typed: in a grid, or one with some cells missing,
the share of a setting is what it explains beyond all others (type II sum of squares), less what noise alone would explain,
of the total (epsilon squared; Kelley 1935). Settings that overlap (nested, or too many cells missing) have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

SEED = 0
DRAWS = 1999
MAX_P = 0.05
"""From this p on that nothing differs, nothing is decomposed."""


class Share(NamedTuple):
    """Share of the variance between configurations, and its 95% interval over other seeds and test items."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Decomposition:
    """What the settings explain."""

    p: float | None
    """That no configuration differs from another; None: there are neither seeds nor test items that could tell."""
    shares: list[Share | None] | None
    """Of each setting, None where it overlaps others; None: nothing differs, or nothing could tell."""
    overlapping: list[int]
    """Settings whose effects cannot be told from those of others."""


def are_one_to_one(first: Sequence[object], second: Sequence[object]) -> bool:
    """Whether each value of one setting always comes with the same value of the other."""
    pairs = {*zip(first, second, strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def find_overlapping(places: "Sequence[np.ndarray]") -> list[int]:
    """The settings whose main effects cannot be told apart: some of their indicators are a combination of others'.

    Args:
        places: of each setting [configurations] the number of its value, from 0 on.
    """
    import numpy as np

    def rank(settings: "Sequence[np.ndarray]") -> int:
        return int(np.linalg.matrix_rank(_indicators(settings, len(places[0]))))

    everything = rank(places)
    return [i for i, p in enumerate(places) if everything - rank([*places[:i], *places[i + 1 :]]) < int(p.max())]


def decompose(
    places: "Sequence[np.ndarray]", values: Sequence[Sequence[float]], items: "np.ndarray | None" = None
) -> Decomposition:
    """The shares of settings.

    Args:
        places: of each setting [configurations] the number of its value, from 0 on.
        values: of each configuration those of its runs, one a seed.
        items: [runs, items] numbers whose means over items are the runs' values, in the order of `values`; None: not known.
    """
    import numpy as np

    overlapping = find_overlapping(places)
    mean = np.array([np.mean(v) for v in values])
    noise, covariance = _noise(values, items)
    if noise is None:
        return Decomposition(None, None, overlapping)
    centred = mean - mean.mean()
    apart = ((noise - noise.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    p = float((1 + (apart >= (centred**2).sum() * (1 - 1e-12)).sum()) / (1 + len(noise)))
    if p >= MAX_P:
        return Decomposition(p, None, overlapping)
    shares = _shares(places, centred, noise, covariance)
    return Decomposition(p, [None if i in overlapping else s for i, s in enumerate(shares)], overlapping)


def _noise(values: Sequence[Sequence[float]], items: "np.ndarray | None") -> "tuple[np.ndarray | None, np.ndarray]":
    """[draws, configurations] how far other seeds and items move the configurations, normal with as heavy tails as the
    numbers of runs and items make them (t); None where nothing is known. And its covariance.
    """
    import numpy as np

    runs, count = np.array([len(v) for v in values]), len(values)
    draw, noise, covariance = np.random.default_rng(SEED), np.zeros((DRAWS, count)), np.zeros((count, count))
    starts, freedom = np.cumsum(runs) - runs, int((runs - 1).sum())
    n = 0 if items is None else items.shape[1]
    if freedom:
        apart = np.concatenate([np.array(v) - np.mean(v) for v in values])
        variance = float((apart**2).sum())
        if n > 1:  # less what other items do to the differences between seeds
            of_configurations = np.add.reduceat(items, starts, axis=0) / runs[:, None]
            rest = np.var(items - np.repeat(of_configurations, runs, axis=0), axis=1, ddof=1)
            variance = max(0.0, variance - float(rest.sum()) / n)
        of_seeds = variance / freedom / runs
        noise += draw.standard_normal((DRAWS, count)) * np.sqrt(of_seeds) * _tails(draw, freedom)
        covariance += np.diag(of_seeds)
    if n > 1:
        of_items = np.cov(np.add.reduceat(items, starts, axis=0) / runs[:, None]).reshape(count, count) / n
        size, vectors = np.linalg.eigh(of_items)
        noise += draw.standard_normal((DRAWS, count)) * np.sqrt(np.maximum(size, 0)) @ vectors.T * _tails(draw, n - 1)
        covariance += of_items
    is_known = freedom > 0 or n > 1
    return (noise if is_known else None), covariance


def _tails(draw: "np.random.Generator", freedom: int) -> "np.ndarray":
    """[draws, 1] what makes normal numbers those of Student's t."""
    import numpy as np

    return np.sqrt(freedom / draw.chisquare(freedom, (DRAWS, 1)))


def _indicators(places: "Sequence[np.ndarray]", count: int) -> "np.ndarray":
    """[configurations, 1 + levels of all settings]."""
    import numpy as np

    columns = [np.ones((count, 1)), *(np.eye(int(p.max()) + 1)[p] for p in places)]
    return np.concatenate(columns, axis=1)


def _projection(matrix: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return matrix @ np.linalg.pinv(matrix)


def _shares(
    places: "Sequence[np.ndarray]", centred: "np.ndarray", noise: "np.ndarray", covariance: "np.ndarray"
) -> list[Share]:
    import numpy as np

    count, levels = len(centred), [int(p.max()) + 1 for p in places]
    everything = _projection(_indicators(places, count))
    total = np.eye(count) - 1 / count
    left = count - round(np.trace(everything))
    if count != np.prod(levels) and left > 0:
        # Not a full grid: what the settings leave unexplained also looks like an effect of each.
        unexplained = float(centred @ (np.eye(count) - everything) @ centred) / left
        if unexplained > np.trace(total @ covariance) / (count - 1):
            draw = np.random.default_rng(SEED)
            noise = draw.standard_normal(noise.shape) * unexplained**0.5 * _tails(draw, left)
            covariance = np.eye(count) * unexplained
    drawn = centred + noise
    found = []
    for i in range(len(places)):
        own = everything - _projection(_indicators([*places[:i], *places[i + 1 :]], count))
        by_chance = float(np.trace(own @ covariance))
        share = (centred @ own @ centred - by_chance) / (centred @ total @ centred)
        # What was drawn holds the noise twice.
        squares = ((drawn @ own) * drawn).sum(axis=1) - 2 * by_chance
        around = squares / (((drawn @ total) * drawn).sum(axis=1) - np.trace(total @ covariance))
        low, high = np.quantile(around, [0.025, 0.975])
        found.append(Share(*(float(min(1, max(0, v))) for v in (share, min(low, share), max(high, share)))))
    return found
