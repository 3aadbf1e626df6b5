"""Shared code of the generators: their return type, distinct draws, splits, and checks of arguments."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cruijff_kit.util.errors import UserError

Rows = list[dict[str, str]]
Splits = dict[str, Rows]
BayesOptimum = dict[str, float]
"""Metric -> its expectation under the best possible model; for accuracy this is the Bayes accuracy."""


@dataclass(frozen=True)
class GeneratedData:
    """A data set as it was drawn."""

    splits: Splits
    """Name -> rows."""
    bayes_optimum: dict[str, BayesOptimum] = field(default_factory=dict)
    """Split -> its Bayes optimum; a split that has none is left out."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Random quantities besides the rows, for example weights."""
    repeats: bool = False
    """Whether splits share rows on purpose."""


def require(ok: bool, message: str) -> None:
    """Raise UserError, which names the argument, unless a condition holds."""
    if not ok:
        raise UserError(f"dataset.arguments.{message}")


def split_rows(rows: list, train_fraction: float, counted: str = "num_rows") -> dict[str, list]:
    """Split rows into train, and the rest into halves, validation and test.

    Args:
        rows: in the order in which they were drawn.
        train_fraction: share of train, in (0, 1).
        counted: the argument that says how many rows there are, for the message.
    Raises:
        UserError: a split would be empty.
    """
    require(0 < train_fraction < 1, f"train_fraction must be between 0 and 1, not {train_fraction}")
    first = int(len(rows) * train_fraction)
    second = int(len(rows) * (train_fraction + (1 - train_fraction) / 2))
    splits = {"train": rows[:first], "validation": rows[first:second], "test": rows[second:]}
    if not all(splits.values()):
        raise UserError(
            f"dataset.arguments: {counted}={len(rows)}, train_fraction={train_fraction} leaves a split empty"
        )
    return splits


def draw_distinct(draw: Callable[[], Any], count: int, key: Callable[[Any], Any], what: str) -> list:
    """Draw `count` items with different keys.

    Args:
        draw: one draw.
        key: what must differ.
        what: the argument to lower, for the message.
    Raises:
        UserError: too many draws were alike.
    """
    draws: dict[Any, Any] = {}
    for _ in range(20 * count + 1000):
        if len(draws) == count:
            break
        item = draw()
        draws.setdefault(key(item), item)
    require(len(draws) == count, f"{what}={count} is too many: {len(draws)} different rows were found")
    return [*draws.values()]


def mean(values: list[float]) -> float:
    """Return the mean, rounded to 6 digits."""
    return round(sum(values) / len(values), 6)


def bayes_accuracy(probabilities: list[float]) -> float:
    """Return the Bayes accuracy for the rows' P(label = 1): the mean of max(p, 1 - p)."""
    return mean([max(p, 1 - p) for p in probabilities])


def sigmoid(z: float) -> float:
    """Return 1 / (1 + exp(-z)) without overflow."""
    return 1 / (1 + math.exp(-z)) if z >= 0 else math.exp(z) / (1 + math.exp(z))
