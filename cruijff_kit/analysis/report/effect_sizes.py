"""How much a setting matters: its levels, and the configurations of each."""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.effects import Decomposition, are_one_to_one, decompose
from cruijff_kit.analysis.report.document import plain, shown
from cruijff_kit.analysis.report.load import Run, finite
from cruijff_kit.analysis.report.outcomes import ConfiguredRuns, Outcome

if TYPE_CHECKING:
    import numpy as np


_BINS = 4  # of a setting that a search drew from a range


_MOST_LEVELS = 12


_MOST_NAMES = 6  # of values of several settings, side by side on an axis


@dataclass(eq=False)
class Effect:
    """A setting that varies, or several that only vary together: each value of one always with the same of the other."""

    keys: tuple[str, ...]
    levels: list[tuple[Any, list[ConfiguredRuns]]]
    """Its values in order, or ranges of them where they are many, with the configurations of each."""
    values: dict[ConfiguredRuns, Any]
    """Configuration -> value, also where levels are ranges."""
    numbers: dict[ConfiguredRuns, float] | None
    """Configuration -> where it stands on an axis; None: values stand side by side."""
    members: tuple["Effect", ...] = ()
    """Of several settings each one."""

    @property
    def name(self) -> str:
        """ "lr with lora.rank"."""
        return " with ".join(self.keys)

    @property
    def drawn_from_range(self) -> bool:
        """Whether levels are ranges."""
        return any(isinstance(value, tuple) for value, _ in self.levels)

    @cached_property
    def places(self) -> dict[ConfiguredRuns, int]:
        """Configuration -> number of its level."""
        return {c: i for i, (_, group) in enumerate(self.levels) for c in group}


@dataclass(eq=False)
class Design:
    """What varies over the configurations, and what came of it."""

    configurations: list[ConfiguredRuns]
    effects: list[Effect]
    """First that with the largest effect, then by what each adds to it."""
    decomposition: Decomposition
    """Its shares are in the order of the effects."""


def find_effects(outcome: Outcome) -> list[Effect]:
    """The settings that vary over the configurations.

    The first effect is the largest one; the others follow by what each adds, which counts its interaction with the first:
    a setting that matters only at a low learning rate has no effect on average.
    """
    configurations = outcome.configurations
    keys = [*dict.fromkeys(k for c in configurations for k in c.configuration.swept)]
    found = _effects(configurations, keys)
    if not found:
        return []
    first = max(found, key=lambda e: _explained(configurations, [e]))
    rest = [e for e in found if e is not first]
    return [first, *sorted(rest, key=lambda e: -_explained(configurations, [first, e]))]


def read_design(outcome: Outcome) -> Design:
    """The settings that vary over the configurations, and how much of what differs goes with each."""
    configurations, found = outcome.configurations, find_effects(outcome)
    if not found:
        return Design(configurations, [], Decomposition(None, None, []))
    values = [c.values for c in configurations]
    return Design(configurations, found, decompose(_places(configurations, found), values, outcome.item_values()))


def _effects(configurations: list[ConfiguredRuns], keys: list[str]) -> list[Effect]:
    together: list[list[Effect]] = []
    for effect in (e for key in keys if len((e := _effect(configurations, key)).levels) > 1):
        places = [effect.places[c] for c in configurations]
        same = (group for group in together if are_one_to_one([group[0].places[c] for c in configurations], places))
        group = next(same, None)
        group.append(effect) if group else together.append([effect])
    return [group[0] if len(group) == 1 else _join(group) for group in together]


def _effect(configurations: list[ConfiguredRuns], key: str) -> Effect:
    found: dict[Any, list[ConfiguredRuns]] = {}
    for c in configurations:
        found.setdefault(level(c.runs[0], key), []).append(c)
    numeric = all(finite(v) for v in found)
    levels = [(v, found[v]) for v in (sorted(found) if numeric else found)]
    values = {c: v for v, group in levels for c in group}
    if numeric and len(levels) > _MOST_LEVELS:
        levels = _ranges(levels, len(configurations))
    return Effect((key,), levels, values, values if numeric else None)


def _join(effects: list[Effect]) -> Effect:
    """Settings that vary together as one, named by all; many values stand where the first setting's do."""
    first = effects[0]
    names = [" with ".join(level_name(e.levels[e.places[group[0]]][0]) for e in effects) for _, group in first.levels]
    levels = [(name, group) for name, (_, group) in zip(names, first.levels, strict=True)]
    numbers = first.numbers if len(levels) > _MOST_NAMES and not first.drawn_from_range else None
    values = {c: name for name, group in levels for c in group}
    return Effect(tuple(e.keys[0] for e in effects), levels, values, numbers, tuple(effects))


def level(run: Run, key: str) -> Any:
    """A run's value of a setting as one that can be compared: lists and the like as text, none as a dash."""
    value = plain(run.value(key))
    return "–" if value is None else value


def _ranges(levels: list[tuple[Any, list[Any]]], number: int) -> list[tuple[Any, list[Any]]]:
    """Neighbouring values together, about as many configurations in each range."""
    ranges: list[list[Any]] = [[] for _ in range(_BINS)]
    before = 0
    for value, group in levels:
        ranges[min(_BINS - 1, before * _BINS // number)].append((value, group))
        before += len(group)
    return [((part[0][0], part[-1][0]), [c for _, group in part for c in group]) for part in ranges if part]


def _places(configurations: list[ConfiguredRuns], effects: list[Effect]) -> "list[np.ndarray]":
    import numpy as np

    return [np.array([e.places[c] for c in configurations]) for e in effects]


def _explained(configurations: list[ConfiguredRuns], effects: list[Effect]) -> float:
    """The variance that goes with combinations of their levels, corrected for how many there are: what orders effects."""
    groups: dict[tuple[Any, ...], list[float]] = {}
    for c in configurations:
        groups.setdefault(tuple(e.places[c] for e in effects), []).append(c.value)
    values = [c.value for c in configurations]
    n, k, mean = len(values), len(groups), sum(values) / len(values)
    within = sum((v - sum(g) / len(g)) ** 2 for g in groups.values() for v in g)
    noise = (k - 1) * within / (n - k) if n > k else 0.0
    return sum((v - mean) ** 2 for v in values) - within - noise


def level_name(value: Any) -> str:
    """A value, or a range of values, as text."""
    return f"{shown(value[0])} to {shown(value[1])}" if isinstance(value, tuple) else shown(value)
