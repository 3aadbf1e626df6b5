"""The report's section on what was varied: how the objective moves with each setting. Seeds are averaged, never an axis."""

from dataclasses import dataclass
from typing import Any

from cruijff_kit.report.document import Section, Table, plain, shown
from cruijff_kit.report.runs import SEED, Family, Run, Runs, finite

_BINS = 4  # of a setting that a search drew from a range
_MOST_LEVELS = 12


@dataclass(eq=False)
class Effect:
    """What a setting does. levels: its values in order, or ranges of them where they are many, with the runs of each.

    share: of the objective's variance over runs that goes with the setting, corrected for how many levels it has
    (epsilon squared; Kelley 1935). numeric: whether its values are numbers.
    """

    key: str
    levels: list[tuple[Any, list[Run]]]
    share: float
    numeric: bool

    @property
    def drawn_from_range(self) -> bool:
        """Whether levels are ranges."""
        return any(isinstance(value, tuple) for value, _ in self.levels)


def by_effect(family: Family) -> list[Effect]:
    """The settings that vary over a family's runs: first that with the largest effect, then by what each adds to it.

    What the second one adds counts its interaction with the first: a setting that matters only at a low learning rate
    has no effect on average.
    """
    keys = dict.fromkeys(k for r in family.runs for k in r.swept if k != SEED)
    found = sorted((e for e in (_effect(k, family.runs) for k in keys) if len(e.levels) > 1), key=lambda e: -e.share)
    return [*found[:1], *sorted(found[1:], key=lambda e: -together(found[0], e))]


def together(first: Effect, second: Effect) -> float:
    """The share of the variance that goes with two settings at once."""
    place = {run: i for i, (_, group) in enumerate(second.levels) for run in group}
    groups: dict[tuple[int, int], list[float]] = {}
    for i, (_, group) in enumerate(first.levels):
        for run in group:
            groups.setdefault((i, place[run]), []).append(run.result.objective)
    return _share([*groups.values()])


def level(run: Run, key: str) -> Any:
    """A run's value of a setting as one that can be compared: lists and the like as text, none as a dash."""
    value = plain(run.value(key))
    return "–" if value is None else value


def _effect(key: str, runs: list[Run]) -> Effect:
    found: dict[Any, list[Run]] = {}
    for r in runs:
        found.setdefault(level(r, key), []).append(r)
    numeric = all(finite(v) for v in found)
    values = sorted(found) if numeric else list(found)
    levels = [(v, found[v]) for v in values]
    if numeric and len(levels) > _MOST_LEVELS:
        levels = _ranges(levels, len(runs))
    return Effect(key, levels, _share([[r.result.objective for r in group] for _, group in levels]), numeric)


def _ranges(levels: list[tuple[Any, list[Run]]], runs: int) -> list[tuple[Any, list[Run]]]:
    """Neighbouring values together, about as many runs in each range."""
    ranges: list[list] = [[] for _ in range(_BINS)]
    before = 0
    for value, group in levels:
        ranges[min(_BINS - 1, before * _BINS // runs)].append((value, group))
        before += len(group)
    return [((part[0][0], part[-1][0]), [r for _, group in part for r in group]) for part in ranges if part]


def _share(groups: list[list[float]]) -> float:
    """Epsilon squared: (between - (k - 1) within / (n - k)) / total sum of squares; plain where each group has one run."""
    values = [v for g in groups for v in g]
    n, k, mean = len(values), len(groups), sum(values) / len(values)
    total = sum((v - mean) ** 2 for v in values)
    within = sum((v - sum(g) / len(g)) ** 2 for g in groups for v in g)
    if total <= 1e-30:
        return 0.0
    noise = (k - 1) * within / (n - k) if n > k else 0.0
    return (total - within - noise) / total


def effects(runs: Runs) -> Section:
    """Lines over one setting; a heat map over the two that matter most; marginal means of all."""
    from cruijff_kit.report.effect_charts import heat_map, line, marginals, scatter

    section = Section("effects", "What the settings do")
    for number, family in enumerate(runs.families[:4], 1):
        found = by_effect(family)
        if not found:
            continue
        name = "effects" if number == 1 else f"effects_{number}"
        if len(found) == 1:
            section.blocks.append(
                scatter(family, found, name) if found[0].drawn_from_range else line(family, found[0], name)
            )
            continue
        searched = any(e.drawn_from_range for e in found[:2])
        section.blocks.append((scatter if searched else heat_map)(family, found, name))
        if len(found) > 2:
            first, second = found[:2]
            section.text.append(
                f"{len(found)} settings vary; {first.key} and {second.key} have the largest effect on {family.name}: "
                f"{first.key} goes with {max(0, first.share):.0%} of its variance over runs, both together with "
                f"{max(0, together(first, second)):.0%} (corrected for how many values they have)."
            )
            section.blocks.append(marginals(family, found[2:], f"{name}_rest"))
        section.blocks.append(_table(family, found, f"{name}_means"))
    if not section.blocks:
        section.absent = "nothing varies over the runs that have finished, but for seeds"
    return section


def level_name(value: Any) -> str:
    """A value, or a range of values, as text."""
    return f"{shown(value[0])} to {shown(value[1])}" if isinstance(value, tuple) else shown(value)


def _table(family: Family, found: list[Effect], name: str) -> Table:
    rows = []
    for e in found:
        for value, group in e.levels:
            scores = [r.result.objective for r in group]
            rows.append(
                [
                    e.key,
                    level_name(value),
                    len(group),
                    sum(scores) / len(scores),
                    min(scores),
                    max(scores),
                    max(0.0, e.share),
                ]
            )
    header = ["setting", "value", "runs", "mean", "lowest", "highest", "share of variance"]
    return Table(name, f"{family.name}: means over all runs of each value (marginal means)", header, rows)
