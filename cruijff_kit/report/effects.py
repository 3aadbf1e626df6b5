"""The report's section on what was varied: how the objective moves with each setting. Seeds are averaged, never an axis."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.effects import MAX_P, Decomposition, are_one_to_one, decompose
from cruijff_kit.comparisons import items_of
from cruijff_kit.report.document import Section, Table, listed, plain, several, shown
from cruijff_kit.report.runs import SEED, Family, Run, Runs, finite

if TYPE_CHECKING:
    import numpy as np

_BINS = 4  # of a setting that a search drew from a range
_MOST_LEVELS = 12
_MOST_NAMES = 6  # of values of several settings, side by side on an axis


@dataclass(eq=False)
class Configuration:
    """Runs that differ in nothing but their seed, one a seed."""

    runs: list[Run]

    @property
    def label(self) -> str:
        """Of its first run, and how many more seeds there are."""
        more = len(self.runs) - 1
        return self.runs[0].label + (f" and {several(more, 'more seed')}" if more else "")

    @property
    def value(self) -> float:
        """The mean of their objectives."""
        return sum(r.result.objective for r in self.runs) / len(self.runs)


@dataclass(eq=False)
class Effect:
    """A setting that varies, or several that only vary together: each value of one always with the same of the other."""

    keys: tuple[str, ...]
    levels: list[tuple[Any, list[Configuration]]]
    """Its values in order, or ranges of them where they are many, with the configurations of each."""
    values: dict[Configuration, Any]
    """Configuration -> value, also where levels are ranges."""
    numbers: dict[Configuration, float] | None
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
    def places(self) -> dict[Configuration, int]:
        """Configuration -> number of its level."""
        return {c: i for i, (_, group) in enumerate(self.levels) for c in group}


@dataclass(eq=False)
class Design:
    """What varies over the configurations of a family, and what came of it."""

    configurations: list[Configuration]
    effects: list[Effect]
    """First that with the largest effect, then by what each adds to it."""
    decomposition: Decomposition
    """Its shares are in the order of the effects."""


def find_effects(family: Family) -> tuple[list[Configuration], list[Effect]]:
    """The configurations of a family, and the settings that vary over them.

    The first effect is the largest one; the others follow by what each adds, which counts its interaction with the first:
    a setting that matters only at a low learning rate has no effect on average.
    """
    keys = [*dict.fromkeys(k for r in family.runs for k in r.swept if k != SEED)]
    configurations = _configurations(family.runs, keys)
    found = _effects(configurations, keys)
    if not found:
        return configurations, []
    first = max(found, key=lambda e: _explained(configurations, [e]))
    rest = [e for e in found if e is not first]
    return configurations, [first, *sorted(rest, key=lambda e: -_explained(configurations, [first, e]))]


def read_design(family: Family) -> Design:
    """The settings that vary over a family's runs, and how much of what differs goes with each."""
    configurations, found = find_effects(family)
    if not found:
        return Design(configurations, [], Decomposition(None, None, []))
    runs = [r for c in configurations for r in c.runs]
    values = [[r.result.objective for r in c.runs] for c in configurations]
    return Design(configurations, found, decompose(_places(configurations, found), values, _item_values(family, runs)))


def _configurations(runs: Iterable[Run], keys: list[str]) -> list[Configuration]:
    """By what varies; of a seed that ran twice the later run. A seed counts whether it was swept or is the default."""
    found: dict[tuple, dict[Any, Run]] = {}
    for run in runs:
        found.setdefault(tuple(level(run, k) for k in keys), {})[run.value(SEED)] = run
    return [Configuration([*by_seed.values()]) for by_seed in found.values()]


def _effects(configurations: list[Configuration], keys: list[str]) -> list[Effect]:
    together: list[list[Effect]] = []
    for effect in (e for key in keys if len((e := _effect(configurations, key)).levels) > 1):
        places = [effect.places[c] for c in configurations]
        same = (group for group in together if are_one_to_one([group[0].places[c] for c in configurations], places))
        group = next(same, None)
        group.append(effect) if group else together.append([effect])
    return [group[0] if len(group) == 1 else _join(group) for group in together]


def _effect(configurations: list[Configuration], key: str) -> Effect:
    found: dict[Any, list[Configuration]] = {}
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


def _ranges(levels: list[tuple[Any, list]], number: int) -> list[tuple[Any, list]]:
    """Neighbouring values together, about as many configurations in each range."""
    ranges: list[list] = [[] for _ in range(_BINS)]
    before = 0
    for value, group in levels:
        ranges[min(_BINS - 1, before * _BINS // number)].append((value, group))
        before += len(group)
    return [((part[0][0], part[-1][0]), [c for _, group in part for c in group]) for part in ranges if part]


def _places(configurations: list[Configuration], effects: list[Effect]) -> "list[np.ndarray]":
    import numpy as np

    return [np.array([e.places[c] for c in configurations]) for e in effects]


def _explained(configurations: list[Configuration], effects: list[Effect]) -> float:
    """The variance that goes with combinations of their levels, corrected for how many there are: what orders effects."""
    groups: dict[tuple, list[float]] = {}
    for c in configurations:
        groups.setdefault(tuple(e.places[c] for e in effects), []).append(c.value)
    values = [c.value for c in configurations]
    n, k, mean = len(values), len(groups), sum(values) / len(values)
    within = sum((v - sum(g) / len(g)) ** 2 for g in groups.values() for v in g)
    noise = (k - 1) * within / (n - k) if n > k else 0.0
    return sum((v - mean) ** 2 for v in values) - within - noise


def _item_values(family: Family, runs: list[Run]) -> "np.ndarray | None":
    """[runs, items] of the test items that all have, where the objective is their mean; None where it is not."""
    import numpy as np

    if family.source is None:
        return None
    task, scorer, _ = family.source
    found = [items_of(cell.log).get(scorer, {}) if (cell := r.last(task)) else {} for r in runs]
    if not all(_is_mean(items, r.result.objective) for items, r in zip(found, runs, strict=True)):
        return None
    shared = [i for i in found[0] if all(i in items for items in found)]
    return np.array([[items[i] for i in shared] for items in found]) if len(shared) > 1 else None


def _is_mean(items: dict[str, float], objective: float) -> bool:
    return bool(items) and abs(sum(items.values()) / len(items) - objective) < 1e-6 * max(1.0, abs(objective))


def effects(runs: Runs) -> Section:
    """Lines over one setting; a heat map over the two that matter most; means of all. Points where settings overlap."""
    from cruijff_kit.report.effect_charts import heat_map, line, marginals, points, scatter

    section = Section("effects", "What the settings do")
    for number, family in enumerate(runs.families[:4], 1):
        design = read_design(family)
        found = design.effects
        if not found:
            continue
        name = "effects" if number == 1 else f"effects_{number}"
        overlapping = [found[i] for i in design.decomposition.overlapping]
        if any(e.drawn_from_range for e in found[:2]):
            section.blocks.append(scatter(family, design, found[:2], name))
        elif len(found) == 1 and found[0].members and found[0].numbers:
            section.blocks.append(scatter(family, design, found[0].members[:2], name))
        elif len(found) == 1:
            section.blocks.append(line(family, found[0], name))
        elif overlapping:
            section.blocks.append(points(family, design, name))
        else:
            section.blocks.append(heat_map(family, design, name))
        if len(found) > 2 and not overlapping:
            section.blocks.append(marginals(family, found[2:], f"{name}_rest"))
        section.text += _sentences(family, design)
        section.blocks.append(_table(family, design, f"{name}_means"))
    if not section.blocks:
        section.absent = "nothing varies over the runs that have finished, but for seeds"
    return section


def _sentences(family: Family, design: Design) -> list[str]:
    found, d = design.effects, design.decomposition
    said = [
        f"{listed([*e.keys])} vary together, each value of one with the same of the other, so nothing tells their effects "
        "apart; they count as one setting."
        for e in found
        if len(e.keys) > 1
    ]
    if d.overlapping:
        said.append(
            f"The runs do not cross {listed([found[i].name for i in d.overlapping])}: some values of one come only with "
            "some of another. Their effects cannot be told apart, and they get no share of the variance."
        )
    if d.p is None:
        said.append(
            f"Nothing tells how much of the differences in {family.name} is chance: it is no mean over test items, and "
            "there are no other seeds (seed=1,2,3 in the sweep would tell). So there are means, and no shares of variance."
        )
    elif d.p >= MAX_P:
        said.append(
            f"No configuration can be told from another by {family.name} (p = {shown(d.p)}), so the variance is not shared "
            "out among the settings."
        )
    known = [(e, s) for e, s in zip(found, d.shares or [None] * len(found), strict=True) if s]
    if known:
        shares = [f"{e.name} {s.share:.0%} ({s.low:.0%} to {s.high:.0%})" for e, s in known]
        said.append(
            f"Share of the variance of {family.name} between configurations, with 95% intervals: {listed(shares)}. The "
            "rest goes with combinations of settings, or is chance: other seeds and test items, so far as they are known."
        )
    return said


def level_name(value: Any) -> str:
    """A value, or a range of values, as text."""
    return f"{shown(value[0])} to {shown(value[1])}" if isinstance(value, tuple) else shown(value)


def _table(family: Family, design: Design, name: str) -> Table:
    shares = design.decomposition.shares if any(design.decomposition.shares or []) else None
    rows = []
    for i, e in enumerate(design.effects):
        for value, group in e.levels:
            scores = [c.value for c in group]
            runs = sum(len(c.runs) for c in group)
            row = [e.name, level_name(value), len(group), runs, sum(scores) / len(scores), min(scores), max(scores)]
            rows.append([*row, *((shares[i] or [None] * 3) if shares else ())])
    header = ["setting", "value", "configurations", "runs", "mean", "lowest", "highest"]
    header += ["share of variance", "low", "high"] if shares else []
    caption = f"{family.name}: means over all configurations of each value (marginal means)"
    return Table(name, caption, header, rows)
