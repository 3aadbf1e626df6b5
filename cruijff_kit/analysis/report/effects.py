"""The report's section on what was varied: how the objective moves with each setting. Seeds are averaged, never an axis."""

from cruijff_kit.analysis.effects import MAX_P
from cruijff_kit.analysis.report.document import Section, Table, listed, shown
from cruijff_kit.analysis.report.effect_charts import heat_map, line, marginals, points, scatter
from cruijff_kit.analysis.report.effect_sizes import Design, level_name, read_design
from cruijff_kit.analysis.report.load import Runs
from cruijff_kit.analysis.report.outcomes import Outcome, outcomes_of


def effects(runs: Runs) -> Section:
    """Lines over one setting; a heat map over the two that matter most; means of all. Points where settings overlap."""
    section = Section("effects", "What the settings do")
    for number, outcome in enumerate(outcomes_of(runs)[:4], 1):
        design = read_design(outcome)
        found = design.effects
        if not found:
            continue
        name = "effects" if number == 1 else f"effects_{number}"
        overlapping = [found[i] for i in design.decomposition.overlapping]
        if any(e.drawn_from_range for e in found[:2]):
            section.blocks.append(scatter(outcome, design, found[:2], name))
        elif len(found) == 1 and found[0].members and found[0].numbers:
            section.blocks.append(scatter(outcome, design, found[0].members[:2], name))
        elif len(found) == 1:
            section.blocks.append(line(outcome, found[0], name))
        elif overlapping:
            section.blocks.append(points(outcome, design, name))
        else:
            section.blocks.append(heat_map(outcome, design, name))
        if len(found) > 2 and not overlapping:
            section.blocks.append(marginals(outcome, found[2:], f"{name}_rest"))
        section.text += _sentences(outcome, design)
        section.blocks.append(_table(outcome, design, f"{name}_means"))
    if not section.blocks:
        section.absent = "the finished runs differ only in their seeds"
    return section


def _sentences(outcome: Outcome, design: Design) -> list[str]:
    found, d = design.effects, design.decomposition
    said = [
        f"{listed([*e.keys])} vary together, each value of one with the same of the other, so their effects "
        "cannot be separated; they count as one setting."
        for e in found
        if len(e.keys) > 1
    ]
    if d.overlapping:
        said.append(
            f"The runs do not cross {listed([found[i].name for i in d.overlapping])}: some values of one come only with "
            "some of another. Their effects cannot be separated, and they get no share of the variance."
        )
    if d.p is None:
        said.append(
            f"How much of the differences in {outcome.name} is chance is unknown: it is no mean over test samples, and "
            "there are no other seeds (add them: seed=1,2,3). So there are means, and no shares of variance."
        )
    elif d.p >= MAX_P:
        said.append(
            f"No configuration can be distinguished from another by {outcome.name} (p = {shown(d.p)}), so the variance "
            "is not shared out among the settings."
        )
    known = [(e, s) for e, s in zip(found, d.shares or [None] * len(found), strict=True) if s]
    if known:
        shares = [f"{e.name} {s.share:.0%} ({s.low:.0%} to {s.high:.0%})" for e, s in known]
        said.append(
            f"Share of the variance of {outcome.name} between configurations, with 95% intervals: {listed(shares)}. The "
            f"rest goes with combinations of settings, or is chance: other seeds and {outcome.units}, so far as these are "
            "known."
        )
    return said


def _table(outcome: Outcome, design: Design, name: str) -> Table:
    shares = design.decomposition.shares if any(design.decomposition.shares or []) else None
    rows = []
    for i, e in enumerate(design.effects):
        for value, group in e.levels:
            scores = [c.value for c in group]
            runs = sum(len(c.runs) for c in group)
            row = [e.name, level_name(value), len(group), runs, sum(scores) / len(scores)]
            row += [*(outcome.interval(group) or (None, None)), min(scores), max(scores)]
            rows.append([*row, *((shares[i] or [None] * 3) if shares else ())])
    header = ["setting", "value", "configurations", "runs", "mean", "mean: low", "mean: high", "lowest", "highest"]
    header += ["share of variance", "low", "high"] if shares else []
    caption = f"{outcome.name}: means over all configurations of each value (marginal means)"
    if any(row[5] is not None for row in rows):
        return Table(name, f"{caption}, with 95% intervals", header, rows)
    return Table(name, caption, [*header[:5], *header[7:]], [[*row[:5], *row[7:]] for row in rows])
