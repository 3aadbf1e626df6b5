"""The report's section on probabilities: ROC and reliability curves, where a scorer gives each sample a risk."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from cruijff_kit.analysis.configurations import Configuration
from cruijff_kit.analysis.estimates import Estimate, estimate, estimate_evaluation
from cruijff_kit.analysis.intervals import LEVEL, wilson
from cruijff_kit.analysis.report.document import Chart, Section, Table, shown
from cruijff_kit.analysis.report.figures import GREY, PALETTE, chart, figure, fitted, legend_below
from cruijff_kit.analysis.report.load import Run, Runs
from cruijff_kit.analysis.report.wording import SAMPLES, selection_in_words, units_of
from cruijff_kit.analysis.table_cells import format_estimate
from cruijff_kit.records.result import Evaluation

BINS = 10
OTHERS = 8  # runs beside the best and the base model
MOST = 4  # configurations that are looked at closely


@dataclass(eq=False)
class Risks:
    """The risks that one model gave to the samples of a task: a run of a configuration, or the base model."""

    label: str
    scorer: str
    cell: Evaluation
    cases: list[tuple[bool, float]]
    """(label is the last option, P(last option)) of each sample."""
    configuration: Configuration | None = None
    """None for the base model."""
    seed: int | None = None
    """Of the run, if its configuration has several."""
    level: float = LEVEL
    """Of its intervals."""

    def estimate(self, metric: str) -> Estimate | None:
        """A metric of the configuration, over its seeds; of the base model its own."""
        if self.configuration is None:
            return estimate_evaluation(self.cell, self.scorer, metric)
        return estimate(self.configuration, self.cell.task, self.scorer, metric, self.level)

    def roc(self) -> list[tuple[float, float]]:
        """(false positive rate, true positive rate), empty for a single class."""
        if len({positive for positive, _ in self.cases}) < 2:
            return []
        from sklearn.metrics import roc_curve

        false, true, _ = roc_curve(*zip(*self.cases, strict=True))
        return [(float(f), float(t)) for f, t in zip(false, true, strict=True)]

    def reliability(self) -> list[tuple[int, int, float, float]]:
        """(bin, samples, mean risk, share of positive labels) of the bins (lo, hi] that hold samples; 0 in the first."""
        edges = [i / BINS for i in range(1, BINS)]
        bins: dict[int, list[tuple[bool, float]]] = {}
        for positive, risk in self.cases:
            bins.setdefault(bisect_left(edges, risk), []).append((positive, risk))
        return [
            (number, len(own), sum(r for _, r in own) / len(own), sum(p for p, _ in own) / len(own))
            for number, own in sorted(bins.items())
        ]


def calibration(runs: Runs) -> Section:
    """For each task with risks: both curves of the best configuration, the base model and some others, and a table.

    Of a configuration of several seeds there is a curve a seed, in one colour.
    """
    section = Section("calibration", "Ranking and calibration of risks")
    seen: set[str] = set()
    ranked = [f.ranking.configurations for f in runs.families]
    for configurations in ranked or [runs.evaluated]:
        for task in dict.fromkeys(e.task for c in configurations for r in c.runs for e in r.evaluation):
            if task in seen:
                continue
            found = _found(runs, configurations, task)
            if found:
                seen.add(task)
                name = "calibration" if len(seen) == 1 else f"calibration_{len(seen)}"
                section.blocks += [*_charts(found, task, name), _table(found, task, name, bool(ranked))]
    if not seen:
        section.absent = _why_absent(runs)
        return section
    if not ranked and len(runs.evaluated) > 1:
        section.text.append(
            f"No configuration is the best: thick lines are those of the first one, {runs.evaluated[0].name}"
            + (f", of the others {OTHERS} are shown." if len(runs.evaluated) > OTHERS + 1 else ".")
        )
    section.text += [
        f"{f.ranking.leader.name} was {selection_in_words(f.ranking)}."
        for f in runs.families
        if f.ranking.is_optimistic
    ]
    seed = " (of several seeds the first one's)" if any(len(c.runs) > 1 for c in runs.evaluated) else ""
    section.text.append(
        f"Reliability: mean risk and share of positive labels in {BINS} equal bins, the {'best' if ranked else 'first'} "
        f"configuration's{seed} with 95% intervals (Wilson{_as_if_independent(runs)}); a calibrated model lies on the "
        "diagonal. ECE is that of the risk (r_ece); it is above 0 for a perfectly calibrated model, too: the table says "
        "how far at this number of samples."
    )
    return section


def _as_if_independent(runs: Runs) -> str:
    units = units_of(r.result for r in runs.with_result)
    return "" if units == SAMPLES else f", counting samples, not {units}"


def _why_absent(runs: Runs) -> str:
    results = [r.result for r in runs.with_result]
    if not any(r.evaluation for r in results):
        return "no run was evaluated"
    if any({"auc", "r_ece"} & {*metrics} for r in results for e in r.evaluation for metrics in e.metrics.values()):
        return "the logs that hold the probabilities are gone, cannot be read, or are of runs that have not finished"
    return "no scorer of these runs gives probabilities (risk_scorer and numeric_risk_scorer do)"


def _found(runs: Runs, configurations: list[Configuration], task: str) -> list[Risks]:
    """The first configuration's, which is the best where there is one; the base model's, then the others'."""
    found: list[Risks] = []
    for c in configurations[: OTHERS + 1]:
        for run in runs.runs_of(c):
            cell = run.last(task)
            own = _risks(c.name, cell) if cell else []
            for risks in own:
                risks.configuration, risks.seed = c, run.value("seed") if len(c.runs) > 1 else None
                risks.level = runs.analysis.interval_level(c, (task, risks.scorer, "auc"))
            found += own
    if not found:
        return []
    trained = [r for c in configurations for r in runs.runs_of(c)]
    before = [r for r in trained if (cell := r.last(task, True)) and _risks("", cell)][:1]
    base_model = [risks for r in before for risks in _risks(f"base model {r.result.model}", r.last(task, True))]
    best = [r for r in found if r.configuration is found[0].configuration]
    return [*best, *base_model, *found[len(best) :]]


def _risks(label: str, cell: Evaluation) -> list[Risks]:
    """Of the first scorer that gives risks."""
    from cruijff_kit.evaluation.eval_logs import risks  # inspect-ai

    try:
        found = risks(cell.log)
    except Exception:  # a log that is gone or broken: the report says what it can without it
        return []
    return [Risks(label, scorer, cell, cases) for scorer, cases in found.items() if cases][:1]


def _once(found: list[Risks]) -> list[Risks]:
    """Of several seeds the first."""
    return list({r.label: r for r in reversed(found)}.values())[::-1]


def _table(found: list[Risks], task: str, name: str, is_ranked: bool) -> Table:
    metrics = {"AUC": "auc", "Brier": "brier", "ECE of risk": "r_ece", "ECE of confidence": "c_ece"}
    rows = []
    for r in _once(found):
        row: list[Any] = [r.label, len(r.cases), len(r.configuration.runs) if r.configuration else None]
        for metric in metrics.values():
            e = r.estimate(metric)
            row += [e and e.value, e and e.low, e and e.high] + ([e and e.if_calibrated] if "ece" in metric else [])
        rows.append(row)
    header = ["configuration", "samples", "seeds"]
    for label, metric in metrics.items():
        header += [label, f"{label}: low", f"{label}: high"]
        header += [f"{label} if calibrated"] if "ece" in metric else []
    marked = {0} if len(rows) > 1 and is_ranked else set()
    return Table(f"{name}_scores", f"Task {task}: ranking and calibration, with 95% intervals", header, rows, marked)


def _colour(found: list[Risks], place: int) -> dict[str, Any]:
    if found[place].cell.epoch is None:
        return {"color": GREY, "linestyle": "--", "linewidth": 1.6, "zorder": 3}
    colours = [PALETTE[1], *(c for i, c in enumerate(PALETTE) if i != 1)]
    labels = list(dict.fromkeys(r.label for r in found if r.cell.epoch is not None))
    number = labels.index(found[place].label)
    width = 2.4 if number == 0 else 1.1
    return {
        "color": colours[number % len(colours)],
        "linewidth": width if found[place].seed is None else width / 2,
        "zorder": 4 if number == 0 else 2,
    }


def _label(found: list[Risks], place: int, metric: str, words: str) -> str | None:
    """Name and metric with its interval, once for all seeds of a configuration."""
    r = found[place]
    if any(other.label == r.label for other in found[:place]):
        return None
    return fitted(r.label, 48) + (f", {words} {format_estimate(e, narrow=True)}" if (e := r.estimate(metric)) else "")


def _charts(found: list[Risks], task: str, name: str) -> list[Chart]:
    return [_roc(found, task, name), _reliability(found, task, name)]


def _roc(found: list[Risks], task: str, name: str) -> Chart:
    curves = [r.roc() for r in found]
    rows = [[r.label, r.seed, *point] for r, curve in zip(found, curves, strict=True) for point in curve]
    header = ["configuration", "seed", "false positive rate", "true positive rate"]
    data = Table(f"{name}_roc", f"Task {task}: ROC curves", header, rows)
    with figure(5.1, 4.6 + 0.16 * len(_once(found))) as drawn:
        axes = drawn.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        for place, curve in enumerate(curves):
            if curve:
                label = _label(found, place, "auc", "AUC")
                axes.plot(*zip(*curve, strict=True), **_colour(found, place), label=label)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_aspect("equal")
        legend_below(axes, len(_once(found)), 60)
        return chart(drawn, data, f"{data.caption}. AUC: {_all_of(found, 'auc')}")


def _reliability(found: list[Risks], task: str, name: str) -> Chart:
    header = ["configuration", "seed", "bin", "from", "to", "samples", "mean risk", "share positive"]
    rows = [
        [r.label, r.seed, number + 1, number / BINS, (number + 1) / BINS, samples, risk, share]
        for r in found
        for number, samples, risk, share in r.reliability()
    ]
    data = Table(f"{name}_reliability", f"Task {task}: reliability", header, rows)
    with figure(5.1, 4.6 + 0.16 * len(_once(found))) as drawn:
        axes = drawn.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        for place, r in enumerate(found):
            bins, style = r.reliability(), _colour(found, place)
            axes.plot([b[2] for b in bins], [b[3] for b in bins], marker="o", markersize=5 if place == 0 else 3.5, **style,
                      label=_label(found, place, "r_ece", "ECE"))  # fmt: skip
            for _, samples, risk, share in bins if place == 0 else []:
                axes.plot([risk, risk], wilson(share, samples, r.level), color=style["color"], linewidth=2, alpha=0.45)
        axes.set(xlabel="mean risk", ylabel="share of positive labels", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_aspect("equal")
        legend_below(axes, len(_once(found)), 60)
        return chart(drawn, data, f"{data.caption}. ECE: {_all_of(found, 'r_ece')}")


def _all_of(found: list[Risks], metric: str) -> str:
    values = [(r.label, r.estimate(metric)) for r in _once(found)]
    return "; ".join(f"{who} {shown(e.value) if e else 'undefined'}" for who, e in values)


def best_configurations(runs: Runs) -> list[list[Run]]:
    """The runs, one a seed, of each family's best configuration (of at most four families) that was evaluated; where there
    is no best, of the first four configurations that were.
    """
    chosen = [f.ranking.leader for f in runs.families[:MOST]] or runs.evaluated[:MOST]
    found = [runs.runs_of(c) for c in chosen]
    return [own for own in found if all(r.result.evaluation for r in own)]


def instead_of_the_best(runs: Runs) -> str:
    """Which configurations those are where none is the best; empty where one is, or where there is no choice."""
    number = len(runs.evaluated)
    if runs.families or number < 2:
        return ""
    which = "both" if number == 2 else "all" if number <= MOST else f"the first {MOST} of {number}"
    return f"No configuration is the best, so this is about {which} configurations."
