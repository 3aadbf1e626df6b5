"""The report's section on the effects of the settings on each outcome, averaged over seeds."""

from cruijff_kit.analysis.effects import MAX_P
from cruijff_kit.analysis.report.document import Section, Table, format_value, join_words
from cruijff_kit.analysis.report.effect_charts import (
    draw_heat_map,
    draw_line,
    draw_marginals,
    draw_points,
    draw_scatter,
)
from cruijff_kit.analysis.report.effect_sizes import Design, format_level, read_design
from cruijff_kit.analysis.report.load import Runs
from cruijff_kit.analysis.report.outcomes import Outcome, collect_outcomes


def build_effects(runs: Runs) -> Section:
    """Build the section: for each outcome a chart, the shares of the variance, and a table of means.

    The chart is a line over one setting, a heat map over the two with the largest effects, a scatter plot of a search, or
    points if settings overlap.
    """
    section = Section("effects", "Effects of the settings")
    for number, outcome in enumerate(collect_outcomes(runs)[:4], 1):
        design = read_design(outcome)
        effects = design.effects
        if not effects:
            continue
        name = "effects" if number == 1 else f"effects_{number}"
        overlapping = [effects[i] for i in design.decomposition.overlapping]
        if any(e.has_ranges for e in effects[:2]):
            section.blocks.append(draw_scatter(outcome, design, effects[:2], name))
        elif len(effects) == 1 and effects[0].members and effects[0].numbers:
            section.blocks.append(draw_scatter(outcome, design, effects[0].members[:2], name))
        elif len(effects) == 1:
            section.blocks.append(draw_line(outcome, effects[0], name))
        elif overlapping:
            section.blocks.append(draw_points(outcome, design, name))
        else:
            section.blocks.append(draw_heat_map(outcome, design, name))
        if len(effects) > 2 and not overlapping:
            section.blocks.append(draw_marginals(outcome, effects[2:], f"{name}_rest"))
        section.text += _describe_effects(outcome, design)
        section.blocks.append(_make_table(outcome, design, f"{name}_means"))
    if not section.blocks:
        section.absent = "the finished runs differ only in their seeds"
    return section


def _describe_effects(outcome: Outcome, design: Design) -> list[str]:
    effects, d = design.effects, design.decomposition
    sentences = [
        f"{join_words([*e.keys])} vary together: their values correspond one to one. Their effects cannot be separated, so "
        "they count as one setting."
        for e in effects
        if len(e.keys) > 1
    ]
    if d.overlapping:
        sentences.append(
            f"The runs do not cross {join_words([effects[i].name for i in d.overlapping])}: some values of one occur only "
            "with some values of another. Their effects cannot be separated, so they have no share of the variance."
        )
    if d.p is None:
        sentences.append(
            f"How much of the differences in {outcome.name} is due to chance is unknown: {outcome.name} is not a mean over "
            "test samples, and there are no other seeds (add them: seed=1,2,3). So only means are given, no shares of the "
            "variance."
        )
    elif d.p >= MAX_P:
        sentences.append(
            f"No configuration can be distinguished from another by {outcome.name} (p = {format_value(d.p)}), so the "
            "settings have no shares of the variance."
        )
    shares = [(e, s) for e, s in zip(effects, d.shares or [None] * len(effects), strict=True) if s]
    if shares:
        share_texts = [f"{e.name} {s.share:.0%} ({s.low:.0%} to {s.high:.0%})" for e, s in shares]
        sentences.append(
            f"Share of the variance of {outcome.name} between configurations, with 95% intervals: "
            f"{join_words(share_texts)}. The rest is due to combinations of settings, or to chance (other seeds and "
            f"{outcome.units}, as far as these are known)."
        )
    return sentences


def _make_table(outcome: Outcome, design: Design, name: str) -> Table:
    shares = design.decomposition.shares if any(design.decomposition.shares or []) else None
    rows = []
    for i, e in enumerate(design.effects):
        for value, group in e.levels:
            scores = [c.value for c in group]
            runs = sum(len(c.runs) for c in group)
            row = [e.name, format_level(value), len(group), runs, sum(scores) / len(scores)]
            row += [*(outcome.interval(group) or (None, None)), min(scores), max(scores)]
            rows.append([*row, *((shares[i] or [None] * 3) if shares else ())])
    header = ["setting", "value", "configurations", "runs", "mean", "mean: low", "mean: high", "lowest", "highest"]
    header += ["share of variance", "low", "high"] if shares else []
    caption = f"{outcome.name}: means over all configurations of each value (marginal means)"
    if any(row[5] is not None for row in rows):
        return Table(name, f"{caption}, with 95% intervals", header, rows)
    return Table(name, caption, [*header[:5], *header[7:]], [[*row[:5], *row[7:]] for row in rows])
