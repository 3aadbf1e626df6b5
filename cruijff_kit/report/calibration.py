"""The report's section on probabilities: ROC and reliability curves, where a scorer gives each sample a risk."""

from dataclasses import dataclass
from typing import Any

from cruijff_kit.report.document import Chart, Section, Table, shown
from cruijff_kit.report.drawing import GREY, PALETTE, chart, figure, fitted, legend_below
from cruijff_kit.report.ranking import wilson
from cruijff_kit.report.runs import Family, Run, Runs
from cruijff_kit.result import Evaluation

BINS = 10
OTHERS = 8  # runs beside the best and the untrained model


@dataclass(eq=False)
class Risks:
    """The risks that one model gave to the samples of a task. cases: (label is the last option, P(last option))."""

    label: str
    scorer: str
    cell: Evaluation
    cases: list[tuple[bool, float]]

    def roc(self) -> list[tuple[float, float]]:
        """(false positive rate, true positive rate), empty for a single class."""
        if len({positive for positive, _ in self.cases}) < 2:
            return []
        from sklearn.metrics import roc_curve

        false, true, _ = roc_curve(*zip(*self.cases, strict=True))
        return [(float(f), float(t)) for f, t in zip(false, true, strict=True)]

    def reliability(self) -> list[tuple[int, int, float, float]]:
        """(bin, samples, mean risk, share of positive labels) of the bins (lo, hi] that hold samples; 0 in the first."""
        from bisect import bisect_left

        edges = [i / BINS for i in range(1, BINS)]
        bins: dict[int, list[tuple[bool, float]]] = {}
        for positive, risk in self.cases:
            bins.setdefault(bisect_left(edges, risk), []).append((positive, risk))
        return [
            (number, len(own), sum(r for _, r in own) / len(own), sum(p for p, _ in own) / len(own))
            for number, own in sorted(bins.items())
        ]


def calibration(runs: Runs) -> Section:
    """For each task with risks: both curves of the best run, the untrained model and some others, and a table."""
    section = Section("calibration", "Ranking and calibration of risks")
    seen: set[str] = set()
    for family in runs.families:
        for task in dict.fromkeys(e.task for r in family.ranked[: OTHERS + 1] for e in r.result.evaluation):
            if task in seen:
                continue
            found = _found(family, task)
            if found:
                seen.add(task)
                name = "calibration" if len(seen) == 1 else f"calibration_{len(seen)}"
                section.blocks += [*_charts(found, task, name), _table(found, task, name)]
    if not seen:
        section.absent = "no scorer of these runs gives probabilities (risk_scorer and numeric_risk_scorer do)"
        return section
    section.text.append(
        f"Reliability: mean risk and share of positive labels in {BINS} equal bins, the best run's with 95% intervals "
        "(Wilson); a calibrated model lies on the diagonal. ECE is that of the risk (r_ece)."
    )
    return section


def _found(family: Family, task: str) -> list[Risks]:
    """The best run's, the untrained model's, then the others'."""
    ranked = family.ranked[: OTHERS + 1]
    found = [risks for r in ranked if (cell := r.last(task)) for risks in _risks(r.label, cell)]
    if not found:
        return []
    before = [r for r in ranked if (cell := r.last(task, True)) and _risks("", cell)][:1]
    untrained = [risks for r in before for risks in _risks(f"untrained {r.result.model}", r.last(task, True))]
    return [found[0], *untrained, *found[1:]]


def _risks(label: str, cell: Evaluation) -> list[Risks]:
    """Of the first scorer that gives risks."""
    from cruijff_kit.evaluation.items import risks  # inspect-ai

    try:
        found = risks(cell.log)
    except Exception:  # a log that is gone or broken: the report says what it can without it
        return []
    return [Risks(label, scorer, cell, cases) for scorer, cases in found.items() if cases][:1]


def _table(found: list[Risks], task: str, name: str) -> Table:
    rows = []
    for r in found:
        metrics = r.cell.metrics.get(r.scorer, {})
        rows.append([r.label, len(r.cases), *(metrics.get(m) for m in ("auc", "brier", "r_ece", "c_ece"))])
    header = ["run", "samples", "AUC", "Brier", "ECE of risk", "ECE of confidence"]
    return Table(
        f"{name}_scores", f"Task {task}: ranking and calibration", header, rows, {0} if len(rows) > 1 else set()
    )


def _colour(found: list[Risks], place: int) -> dict[str, Any]:
    if found[place].cell.epoch is None:
        return {"color": GREY, "linestyle": "--", "linewidth": 1.6, "zorder": 3}
    colours = [PALETTE[1], *(c for i, c in enumerate(PALETTE) if i != 1)]
    others = place - any(r.cell.epoch is None for r in found[:place])
    return {
        "color": colours[others % len(colours)],
        "linewidth": 2.4 if place == 0 else 1.1,
        "zorder": 4 if place == 0 else 2,
    }


def _charts(found: list[Risks], task: str, name: str) -> list[Chart]:
    return [_roc(found, task, name), _reliability(found, task, name)]


def _roc(found: list[Risks], task: str, name: str) -> Chart:
    curves = [r.roc() for r in found]
    rows = [[r.label, false, true] for r, curve in zip(found, curves, strict=True) for false, true in curve]
    data = Table(f"{name}_roc", f"Task {task}: ROC curves", ["run", "false positive rate", "true positive rate"], rows)
    with figure(5.1, 4.6 + 0.16 * len(found)) as drawn:
        axes = drawn.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        for place, (r, curve) in enumerate(zip(found, curves, strict=True)):
            if curve:
                auc = r.cell.metrics.get(r.scorer, {}).get("auc")
                label = fitted(r.label, 48) + (f", AUC {auc:.3f}" if auc is not None else "")
                axes.plot(*zip(*curve, strict=True), **_colour(found, place), label=label)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_aspect("equal")
        legend_below(axes, len(found), 60)
        aucs = [(r.label, r.cell.metrics.get(r.scorer, {}).get("auc")) for r in found]
        return chart(
            drawn, data, f"{data.caption}. AUC: " + "; ".join(f"{who} {shown(v) or 'undefined'}" for who, v in aucs)
        )


def _reliability(found: list[Risks], task: str, name: str) -> Chart:
    header = ["run", "bin", "from", "to", "samples", "mean risk", "share positive"]
    rows = [
        [r.label, number + 1, number / BINS, (number + 1) / BINS, samples, risk, share]
        for r in found
        for number, samples, risk, share in r.reliability()
    ]
    data = Table(f"{name}_reliability", f"Task {task}: reliability", header, rows)
    with figure(5.1, 4.6 + 0.16 * len(found)) as drawn:
        axes = drawn.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        for place, r in enumerate(found):
            bins, style = r.reliability(), _colour(found, place)
            axes.plot([b[2] for b in bins], [b[3] for b in bins], marker="o", markersize=5 if place == 0 else 3.5, **style,
                      label=fitted(r.label, 60))  # fmt: skip
            for _, samples, risk, share in bins if place == 0 else []:
                axes.plot([risk, risk], wilson(share, samples), color=style["color"], linewidth=2, alpha=0.45)
        axes.set(xlabel="mean risk", ylabel="share of positive labels", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_aspect("equal")
        legend_below(axes, len(found), 60)
        errors = [(r.label, r.cell.metrics.get(r.scorer, {}).get("r_ece")) for r in found]
        return chart(
            drawn, data, f"{data.caption}. ECE: " + "; ".join(f"{who} {shown(v) or 'undefined'}" for who, v in errors)
        )


def best_runs(runs: Runs) -> list[Run]:
    """The best run of each family (of at most four) that was evaluated."""
    return [f.best for f in runs.families[:4] if f.best and f.best.result.evaluation]
