"""Estimate the share of variance between configurations that each setting explains; test whether they differ at all.

The values are the configurations' (means over their seeds). Two sources of noise move them beside the settings: seeds,
whose variance is pooled over the runs of all configurations; and test items, which all configurations share. If neither
is known, nothing is decomposed.

Settings are separated by the rank of the design, not by the sweep's overrides: in a grid, also with some cells missing, the
share of a setting is what it explains beyond all others (type II sum of squares), less what noise alone would explain, of
the total (epsilon squared; Kelley 1935). Settings that overlap (nested, or too many cells missing) have no share.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np

SEED = 0
DRAWS = 1999
MAX_P = 0.05
"""Smallest p of no difference at which nothing is decomposed."""


class Share(NamedTuple):
    """Share of the variance between configurations, and its 95% interval over other seeds and test items."""

    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Decomposition:
    """The variance that the settings explain."""

    p: float | None
    """p of no difference between configurations; None without seeds and test items to test it with."""
    shares: list[Share | None] | None
    """Share of each setting, None where it overlaps others; None in all if p is None or at least MAX_P."""
    overlapping: list[int]
    """Indices of the settings whose effects cannot be separated from those of others."""


def are_one_to_one(first: Sequence[object], second: Sequence[object]) -> bool:
    """Return whether each value of one setting always comes with the same value of the other."""
    pairs = {*zip(first, second, strict=True)}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def find_overlapping(levels: "Sequence[np.ndarray]") -> list[int]:
    """Return the indices of settings whose main effects cannot be separated: some of their indicators are a linear
    combination of those of other settings.

    Args:
        levels: for each setting [configurations] the number of its value, from 0 on.
    """
    import numpy as np

    def rank(settings: "Sequence[np.ndarray]") -> int:
        return int(np.linalg.matrix_rank(_indicators(settings, len(levels[0]))))

    full_rank = rank(levels)
    return [i for i, p in enumerate(levels) if full_rank - rank([*levels[:i], *levels[i + 1 :]]) < int(p.max())]


def decompose(
    levels: "Sequence[np.ndarray]", values: Sequence[Sequence[float]], items: "np.ndarray | None" = None
) -> Decomposition:
    """Decompose the variance between configurations into the shares of settings.

    Args:
        levels: for each setting [configurations] the number of its value, from 0 on.
        values: for each configuration the values of its runs, one for each seed.
        items: [runs, items] numbers whose means over items are the runs' values, in the order of `values`; None: unknown.
    """
    import numpy as np

    overlapping = find_overlapping(levels)
    mean = np.array([np.mean(v) for v in values])
    noise, covariance = draw_noise(values, items)
    if noise is None:
        return Decomposition(None, None, overlapping)
    centred = mean - mean.mean()
    null_squares = ((noise - noise.mean(axis=1, keepdims=True)) ** 2).sum(axis=1)
    p = float((1 + (null_squares >= (centred**2).sum() * (1 - 1e-12)).sum()) / (1 + len(noise)))
    if p >= MAX_P:
        return Decomposition(p, None, overlapping)
    shares = _compute_shares(levels, centred, noise, covariance)
    return Decomposition(p, [None if i in overlapping else s for i, s in enumerate(shares)], overlapping)


def draw_noise(values: Sequence[Sequence[float]], items: "np.ndarray | None") -> "tuple[np.ndarray | None, np.ndarray]":
    """Draw the noise of the configurations' values over other seeds and items: normal, with the tails of Student's t for
    the numbers of runs and items.

    Returns:
        [draws, configurations] noise, None where its variance is unknown; and its covariance [configurations,
        configurations].
    """
    import numpy as np

    runs, count = np.array([len(v) for v in values]), len(values)
    rng, noise, covariance = np.random.default_rng(SEED), np.zeros((DRAWS, count)), np.zeros((count, count))
    starts, freedom = np.cumsum(runs) - runs, int((runs - 1).sum())
    items = None if items is None or items.shape[1] < 2 else items
    if freedom:
        residuals = np.concatenate([np.array(v) - np.mean(v) for v in values])
        variance = float((residuals**2).sum())
        if items is not None:  # without the variance that items add to the differences between seeds
            means = np.add.reduceat(items, starts, axis=0) / runs[:, None]
            item_variance = np.var(items - np.repeat(means, runs, axis=0), axis=1, ddof=1)
            variance = max(0.0, variance - float(item_variance.sum()) / items.shape[1])
        seed_variance = variance / freedom / runs
        noise += rng.standard_normal((DRAWS, count)) * np.sqrt(seed_variance) * _draw_tails(rng, freedom)
        covariance += np.diag(seed_variance)
    if items is not None:
        n = items.shape[1]
        item_covariance = np.cov(np.add.reduceat(items, starts, axis=0) / runs[:, None]).reshape(count, count) / n
        sizes, vectors = np.linalg.eigh(item_covariance)
        scaled = rng.standard_normal((DRAWS, count)) * np.sqrt(np.maximum(sizes, 0))
        noise += scaled @ vectors.T * _draw_tails(rng, n - 1)
        covariance += item_covariance
    is_known = freedom > 0 or items is not None
    return (noise if is_known else None), covariance


def _draw_tails(rng: "np.random.Generator", freedom: int) -> "np.ndarray":
    """Draw [draws, 1] the factors that turn normal numbers into Student's t."""
    import numpy as np

    return np.sqrt(freedom / rng.chisquare(freedom, (DRAWS, 1)))


def _indicators(levels: "Sequence[np.ndarray]", count: int) -> "np.ndarray":
    """Return the design matrix [configurations, 1 + values of all settings]."""
    import numpy as np

    columns = [np.ones((count, 1)), *(np.eye(int(p.max()) + 1)[p] for p in levels)]
    return np.concatenate(columns, axis=1)


def _projection(matrix: "np.ndarray") -> "np.ndarray":
    import numpy as np

    return matrix @ np.linalg.pinv(matrix)


def _compute_shares(
    levels: "Sequence[np.ndarray]", centred: "np.ndarray", noise: "np.ndarray", covariance: "np.ndarray"
) -> list[Share]:
    import numpy as np

    count, sizes = len(centred), [int(p.max()) + 1 for p in levels]
    full_model = _projection(_indicators(levels, count))
    total = np.eye(count) - 1 / count
    freedom = count - round(np.trace(full_model))
    if count != np.prod(sizes) and freedom > 0:
        # Without a full grid, the residual of the settings also contributes to the effect of each.
        residual = float(centred @ (np.eye(count) - full_model) @ centred) / freedom
        if residual > np.trace(total @ covariance) / (count - 1):
            rng = np.random.default_rng(SEED)
            noise = rng.standard_normal(noise.shape) * residual**0.5 * _draw_tails(rng, freedom)
            covariance = np.eye(count) * residual
    draws = centred + noise
    shares = []
    for i in range(len(levels)):
        effect = full_model - _projection(_indicators([*levels[:i], *levels[i + 1 :]], count))
        noise_part = float(np.trace(effect @ covariance))
        share = (centred @ effect @ centred - noise_part) / (centred @ total @ centred)
        # The draws contain the noise twice.
        squares = ((draws @ effect) * draws).sum(axis=1) - 2 * noise_part
        simulated = squares / (((draws @ total) * draws).sum(axis=1) - np.trace(total @ covariance))
        low, high = np.quantile(simulated, [0.025, 0.975])
        shares.append(Share(*(float(min(1, max(0, v))) for v in (share, min(low, share), max(high, share)))))
    return shares
