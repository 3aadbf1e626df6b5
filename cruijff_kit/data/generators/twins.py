"""Synthetic twins: the traits of two people; are they identical twins (1) or fraternal ones (0)?

Every trait of a pair is a draw of two standard normals whose correlation is higher for identical twins, so the best answer
is known: the more likely of two bivariate normal densities.
"""

import math
import random

from cruijff_kit.data.generators.common import (
    GeneratedData,
    bayes_accuracy,
    draw_distinct,
    require,
    sigmoid,
    split_rows,
)

Pair = tuple[str, list[tuple[float, float]]]  # label, and the values of the two twins trait by trait


def draw_synthetic_twins(
    num_rows: int = 1000,
    traits: int = 24,
    r_identical: float = 0.8,
    r_fraternal: float = 0.4,
    train_fraction: float = 0.8,
    seed: int = 0,
) -> GeneratedData:
    """Pairs as "V1: 0.12, -0.40, V10: ..." (in alphabetical order of the traits' names) and "1" or "0".

    Args:
        num_rows: pairs in all.
        traits: values per twin.
        r_identical, r_fraternal: correlation of a trait within a pair.
        train_fraction: share of ``train``; what is left is halved.
        seed: of the draw.
    Raises:
        UserError: an argument out of range.
    """
    require(1 <= traits <= 200, f"traits must be from 1 to 200, not {traits}")
    require(num_rows >= 3, f"num_rows must be at least 3, not {num_rows}")
    for name, r in (("r_identical", r_identical), ("r_fraternal", r_fraternal)):
        require(-1 < r < 1, f"{name} must be between -1 and 1, not {r}")
    rng = random.Random(seed)
    pairs = draw_distinct(
        lambda: _pair(rng, traits, r_identical, r_fraternal), num_rows, lambda p: str(p[1]), "num_rows"
    )
    names = sorted(range(1, traits + 1), key=lambda n: f"V{n}")
    splits = split_rows(pairs, train_fraction)
    rows = {split: [{"input": _format_pair(p, names), "output": p[0]} for p in part] for split, part in splits.items()}
    chances = {
        split: [_probability_identical(p[1], r_identical, r_fraternal) for p in part] for split, part in splits.items()
    }
    return GeneratedData(rows, {split: {"accuracy": bayes_accuracy(p)} for split, p in chances.items()})


def _pair(rng: random.Random, traits: int, r_identical: float, r_fraternal: float) -> Pair:
    identical = rng.random() < 0.5
    r = r_identical if identical else r_fraternal
    values = []
    for _ in range(traits):
        a, noise = rng.gauss(0, 1), rng.gauss(0, 1)
        values.append((round(a, 2), round(r * a + math.sqrt(1 - r * r) * noise, 2)))
    return "1" if identical else "0", values


def _format_pair(pair: Pair, names: list[int]) -> str:
    return ", ".join(f"V{n}: {pair[1][n - 1][0]:.2f}, {pair[1][n - 1][1]:.2f}" for n in names)


def _probability_identical(values: list[tuple[float, float]], r_identical: float, r_fraternal: float) -> float:
    """P(identical | values), both kinds being equally frequent."""
    odds = sum(_log_density(a, b, r_identical) - _log_density(a, b, r_fraternal) for a, b in values)
    return sigmoid(odds)


def _log_density(a: float, b: float, r: float) -> float:
    """Logarithm of the density of two standard normals of correlation r, without what does not depend on r."""
    rest = 1 - r * r
    return -0.5 * math.log(rest) - (a * a - 2 * r * a * b + b * b) / (2 * rest)
