"""The report's section on the best configurations: by what they were chosen, and what they got on the test split.

Values with intervals, against the base model, chance, and the best.
"""

from typing import Any

from cruijff_kit.analysis.comparisons import BASE_MODEL, BEST, CHANCE, NO_BETTER_THAN_CHANCE, SAME_ANSWER
from cruijff_kit.analysis.configurations import Configuration, is_finite
from cruijff_kit.analysis.estimates import Estimate
from cruijff_kit.analysis.report.document import Chart, Section, Table, listed, several, shown
from cruijff_kit.analysis.report.figures import GREY, PALETTE, chart, figure, fitted
from cruijff_kit.analysis.report.load import Family, Runs
from cruijff_kit.analysis.report.outcomes import ConfiguredRuns, Outcome, outcomes_of
from cruijff_kit.analysis.report.wording import (
    SAMPLES,
    detectable_differences,
    over_in_words,
    percent,
    range_in_words,
    selection_in_words,
    test_in_words,
    units_of,
)

MOST = 30  # configurations in a chart
MOST_TABLES = 8
_PARTS = ("difference", "low", "high", "p", "p (Holm)")


def ranking(runs: Runs) -> Section:
    """By what each family of configurations was chosen, then each score on the test split: a chart and a table each."""
    section = Section("best", "The best configurations")
    analysis = runs.analysis
    if not analysis.configurations:
        section.absent = "no run has finished"
        return section
    if why := runs.analysis.no_best_reason:
        section.title = "The configurations compared"
        section.text.append(why)
    outcomes, chosen = outcomes_of(runs), len(runs.families)
    section.text += [_sentence(*both) for both in zip(runs.families[:4], outcomes, strict=False)]
    for number, outcome in enumerate(outcomes[:chosen][:4], 1):
        section.blocks += _blocks(outcome, "best_runs" if number == 1 else f"best_runs_{number}")
    if chosen > 4:
        section.text.append(f"{chosen - 4} more objectives stand in the first table only.")
    for number, outcome in enumerate(outcomes[chosen:][:MOST_TABLES], 1):
        section.blocks += _blocks(outcome, f"test_scores_{number}")
    section.text += _explanations(runs)
    return section


def _sentence(family: Family, outcome: Outcome) -> str:
    r, e = family.ranking, outcome.estimate(outcome.configurations[0])
    value = shown(e.value) + (f" {ends}" if (ends := range_in_words(e)) else "")
    if len(r.configurations) == 1:
        return f"{family.name[0].upper()}{family.name[1:]}: {value}, {r.leader.name}."
    of = several(len(r.configurations), "configuration")
    text = f"Best {family.name} on the {r.split} split: {value}, {r.leader.name}, of {of}."
    if others := [c.name for c in r.best[1:]]:
        some = listed(others[:8]) + (f" and {len(others) - 8} more" if len(others) > 8 else "")
        text += f" Indistinguishable from it: {some}."
    if r.is_optimistic:
        text += f" It was {selection_in_words(r)}, and comparisons of others with it favour it."
    return text + (f" {r.note[0].upper()}{r.note[1:]}." if r.note else "")


def _blocks(outcome: Outcome, name: str) -> list[Chart | Table]:
    found = [(c, outcome.estimate(c)) for c in outcome.configurations]
    return [_chart(outcome, found, name), _table(outcome, found, name)]


def _best(outcome: Outcome) -> list[Configuration]:
    """Those that are best, where there is a choice."""
    return [c for r in outcome.analysis.rankings for c in r.best if len(r.configurations) > 1]


def _table(outcome: Outcome, found: list[tuple[ConfiguredRuns, Estimate]], name: str) -> Table:
    header = [
        "configuration",
        "seeds",
        "value",
        "low",
        "high",
        "sd over seeds",
        "if calibrated",
        "base model",
        "chance",
    ]
    parts = [*_PARTS, outcome.units.removeprefix("test "), "test"]
    header += [f"versus {against}: {p}" for against in (BASE_MODEL, CHANCE, BEST) for p in parts]
    rows = []
    for c, e in found:
        row: list[Any] = [c.label, len(c.runs), e.value, e.low, e.high, e.seed_deviation, e.if_calibrated]
        row += [outcome.base_model(c), outcome.chance(c)]
        for against in (BASE_MODEL, CHANCE, BEST):
            row += _difference(outcome, c, against)
        rows.append(row)
    kept = [i for i in range(len(header)) if i < 3 or any(row[i] is not None for row in rows)]
    marked = {i for i, (c, _) in enumerate(found) if c.configuration in _best(outcome)}
    caption = f"Configurations by {outcome.name}"
    return Table(name, caption, [header[i] for i in kept], [[row[i] for i in kept] for row in rows], marked)


def _difference(outcome: Outcome, own: ConfiguredRuns, against: str) -> list[Any]:
    for c in outcome.analysis.comparisons[own.label]:
        if (c.against, c.metric_key) == (against, outcome.measured):
            values = [c.difference, c.low, c.high, c.p, c.p_holm]
            return [*(v if is_finite(v) else None for v in values), c.items, test_in_words(c.method, outcome.units)]
    return [None] * (len(_PARTS) + 2)


def _chart(outcome: Outcome, found: list[tuple[ConfiguredRuns, Estimate]], name: str) -> Chart:
    top = found[:MOST]
    rows: list[list[Any]] = [
        [c.label, e.value, e.low, e.high, outcome.base_model(c), outcome.chance(c)] for c, e in top
    ]
    shown_are = f"{len(top)} of {len(found)} configurations" if len(top) < len(found) else "every configuration"
    levels = listed([percent(level) for level in sorted({e.level for _, e in top if e.low is not None})], "or")
    over = listed(sorted({over_in_words(e.over, outcome.units) for _, e in top} - {""}))
    caption = f"{outcome.name}, {shown_are}" + (f", with {levels} intervals over {over}" if over else "")
    data = Table(f"{name}_chart", caption, ["configuration", "value", "low", "high", "base model", "chance"], rows)
    best = {c.name for c in _best(outcome)}
    with figure(8, 1.1 + 0.24 * len(rows)) as drawn:
        axes = drawn.subplots()
        for place, (label, value, low, high, *_) in enumerate(rows):
            colour = PALETTE[1] if label in best else PALETTE[0]
            if low is not None:
                axes.plot([low, high], [place, place], color=colour, linewidth=2, solid_capstyle="butt", alpha=0.6)
            axes.plot([value], [place], "o", color=colour, markersize=5.5)
        _mark_known(axes, [c for c, _ in top], outcome)
        axes.set(yticks=range(len(rows)), yticklabels=[fitted(r[0], 60) for r in rows], xlabel=outcome.name)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.grid(False, axis="y")
        alt = f"{caption}. First: {rows[0][0]} with {shown(rows[0][1])}; last shown: {shown(rows[-1][1])}."
        return chart(drawn, data, alt)


def _mark_known(axes: Any, configurations: list[ConfiguredRuns], outcome: Outcome) -> None:
    """The base model, chance (a mark a configuration, where they differ a line would say nothing), the known best."""
    looks = {"base model": (outcome.base_model, GREY, "--", "D"), "chance": (outcome.chance, PALETTE[4], "-.", "s")}
    for label, (read, colour, line, mark) in looks.items():
        values = [read(c) for c in configurations]
        if None not in values and len(set(values)) == 1:
            axes.axvline(values[0], color=colour, linestyle=line, linewidth=1.2, label=label)
        elif known := [(v, i) for i, v in enumerate(values) if v is not None]:
            axes.plot(*zip(*known, strict=True), mark, color=colour, markersize=4, linestyle="", label=label)
    bayes_optima = {outcome.bayes_optimum(c) for c in configurations}
    if len(bayes_optima) == 1 and None not in bayes_optima:
        axes.axvline(bayes_optima.pop(), color=PALETTE[2], linestyle=":", linewidth=1.5, label="Bayes optimum")
    if axes.get_legend_handles_labels()[1]:
        axes.figure.legend(loc="outside upper right", ncols=3)


def _explanations(runs: Runs) -> list[str]:
    analysis = runs.analysis
    results = [r for c in analysis.configurations for r in c.runs]
    text, units = [], units_of(results)
    of_one = "" if units == SAMPLES else f"; what counts are the {units} that the samples are of"
    if any(analysis.comparisons.values()):
        text.append(
            f"Both sides of a difference answered the same test samples, and are compared sample by sample{of_one}. The "
            "more is compared, the more is found by chance alone: so p (Holm) is corrected for everything that this "
            "section tests, and the intervals of the differences are wide enough to hold the true ones all at once in 95% "
            "of studies like this. Chance is the best constant answer: the most frequent one of the training split, for "
            "numbers their mean or median."
        )
    if any(e.method == SAME_ANSWER for found in analysis.comparisons.values() for e in found):
        text.append(
            "A configuration that gives every sample the same answer has no p: its score is no evidence of skill."
        )
    if any(e.method == NO_BETTER_THAN_CHANCE for found in analysis.comparisons.values() for e in found):
        text.append(
            "A configuration that is better than the base model, but no better than chance, has no p against the "
            "base model: it may have learnt only the form of the answers."
        )
    if any(len(c.runs) > 1 for c in analysis.configurations):
        text.append(
            f"Runs that differ only in their seed are one configuration. Its interval and its comparisons allow for other "
            f"{units} and for other seeds (crossed random effects)."
        )
    if len(analysis.configurations) > 1:
        text += detectable_differences(runs)
    return text + ([analysis.one_seed_notice] if analysis.one_seed_notice else [])
