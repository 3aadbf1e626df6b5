"""The settings that vary, with their levels and the configurations of each, in order of their effects."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.configurations import is_finite
from cruijff_kit.analysis.effects import Decomposition, are_one_to_one, decompose
from cruijff_kit.analysis.report.document import format_value, plain_value
from cruijff_kit.analysis.report.load import ReportRun
from cruijff_kit.analysis.report.outcomes import ConfiguredRuns, Outcome

if TYPE_CHECKING:
    import numpy as np


_BINS = 4  # ranges of a setting with more than _MAX_LEVELS values, as a search draws them
_MAX_LEVELS = 12
_MAX_NAMES = 6  # combined values of several settings that fit side by side on an axis


@dataclass(eq=False)
class Effect:
    """A setting that varies, or several whose values correspond one to one."""

    keys: tuple[str, ...]
    levels: list[tuple[Any, list[ConfiguredRuns]]]
    """Values in order, or ranges (low, high) of many values, with the configurations of each."""
    values: dict[ConfiguredRuns, Any]
    """Configuration -> value, also if levels are ranges."""
    numbers: dict[ConfiguredRuns, float] | None
    """Configuration -> position on an axis; None: levels are side by side."""
    members: tuple["Effect", ...] = ()
    """The effects of the single settings, if there are several."""

    @property
    def name(self) -> str:
        """Return the names of the settings: "lr with lora.rank"."""
        return " with ".join(self.keys)

    @property
    def has_ranges(self) -> bool:
        """Return whether levels are ranges."""
        return any(isinstance(value, tuple) for value, _ in self.levels)

    @cached_property
    def level_numbers(self) -> dict[ConfiguredRuns, int]:
        """Return configuration -> number of its level."""
        return {c: i for i, (_, group) in enumerate(self.levels) for c in group}


@dataclass(eq=False)
class Design:
    """The settings that vary over the configurations, and their shares of the variance."""

    configurations: list[ConfiguredRuns]
    effects: list[Effect]
    """Effects in the order of `find_effects`."""
    decomposition: Decomposition
    """Shares in the order of the effects."""


def find_effects(outcome: Outcome) -> list[Effect]:
    """Return the settings that vary over the configurations, the largest effect first.

    The others are ordered by the variance that each explains together with the first, which includes their interaction: a
    setting that matters only at a low learning rate has no effect on average.
    """
    configurations = outcome.configurations
    keys = [*dict.fromkeys(k for c in configurations for k in c.configuration.swept)]
    effects = _build_effects(configurations, keys)
    if not effects:
        return []
    largest = max(effects, key=lambda e: _explained_variance(configurations, [e]))
    others = [e for e in effects if e is not largest]
    return [largest, *sorted(others, key=lambda e: -_explained_variance(configurations, [largest, e]))]


def read_design(outcome: Outcome) -> Design:
    """Return the settings that vary over the configurations, and the share of the variance of each."""
    configurations, effects = outcome.configurations, find_effects(outcome)
    if not effects:
        return Design(configurations, [], Decomposition(None, None, []))
    values, levels = [c.values for c in configurations], _level_arrays(configurations, effects)
    return Design(configurations, effects, decompose(levels, values, outcome.item_values()))


def _build_effects(configurations: list[ConfiguredRuns], keys: list[str]) -> list[Effect]:
    def levels(effect: Effect) -> list[int]:
        return [effect.level_numbers[c] for c in configurations]

    groups: list[list[Effect]] = []
    for effect in (e for key in keys if len((e := _build_effect(configurations, key)).levels) > 1):
        group = next((group for group in groups if are_one_to_one(levels(group[0]), levels(effect))), None)
        group.append(effect) if group else groups.append([effect])
    return [group[0] if len(group) == 1 else _join(group) for group in groups]


def _build_effect(configurations: list[ConfiguredRuns], key: str) -> Effect:
    groups: dict[Any, list[ConfiguredRuns]] = {}
    for c in configurations:
        groups.setdefault(comparable_value(c.runs[0], key), []).append(c)
    is_numeric = all(is_finite(v) for v in groups)
    levels = [(v, groups[v]) for v in (sorted(groups) if is_numeric else groups)]
    values = {c: v for v, group in levels for c in group}
    if is_numeric and len(levels) > _MAX_LEVELS:
        levels = _group_into_ranges(levels, len(configurations))
    return Effect((key,), levels, values, values if is_numeric else None)


def _join(effects: list[Effect]) -> Effect:
    """Join settings that vary together into one effect; many values have the first setting's positions on an axis."""
    first = effects[0]
    names = [
        " with ".join(format_level(e.levels[e.level_numbers[group[0]]][0]) for e in effects)
        for _, group in first.levels
    ]
    levels = [(name, group) for name, (_, group) in zip(names, first.levels, strict=True)]
    numbers = first.numbers if len(levels) > _MAX_NAMES and not first.has_ranges else None
    values = {c: name for name, group in levels for c in group}
    return Effect(tuple(e.keys[0] for e in effects), levels, values, numbers, tuple(effects))


def comparable_value(run: ReportRun, key: str) -> Any:
    """Return a run's value of a setting as a value that can be compared: lists as text, None as a dash."""
    value = plain_value(run.value(key))
    return "–" if value is None else value


def _group_into_ranges(levels: list[tuple[Any, list[Any]]], number: int) -> list[tuple[Any, list[Any]]]:
    """Group neighbouring values into ranges with about equal numbers of configurations."""
    ranges: list[list[Any]] = [[] for _ in range(_BINS)]
    count = 0
    for value, group in levels:
        ranges[min(_BINS - 1, count * _BINS // number)].append((value, group))
        count += len(group)
    return [((part[0][0], part[-1][0]), [c for _, group in part for c in group]) for part in ranges if part]


def _level_arrays(configurations: list[ConfiguredRuns], effects: list[Effect]) -> "list[np.ndarray]":
    import numpy as np

    return [np.array([e.level_numbers[c] for c in configurations]) for e in effects]


def _explained_variance(configurations: list[ConfiguredRuns], effects: list[Effect]) -> float:
    """Return the sum of squares between combinations of levels, less its expectation under no effect; it orders effects."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for c in configurations:
        groups.setdefault(tuple(e.level_numbers[c] for e in effects), []).append(c.value)
    values = [c.value for c in configurations]
    n, k, mean = len(values), len(groups), sum(values) / len(values)
    within = sum((v - sum(g) / len(g)) ** 2 for g in groups.values() for v in g)
    expected_noise = (k - 1) * within / (n - k) if n > k else 0.0
    return sum((v - mean) ** 2 for v in values) - within - expected_noise


def format_level(value: Any) -> str:
    """Format a value, or a range of values."""
    return f"{format_value(value[0])} to {format_value(value[1])}" if isinstance(value, tuple) else format_value(value)
