"""The report's section on probabilities: ROC and reliability curves, if a scorer gives each sample a risk."""

from bisect import bisect_left
from dataclasses import dataclass
from typing import Any

from cruijff_kit.analysis.comparisons import BASE_MODEL
from cruijff_kit.analysis.configurations import Configuration
from cruijff_kit.analysis.estimates import Estimate, estimate, estimate_evaluation
from cruijff_kit.analysis.intervals import LEVEL, wilson
from cruijff_kit.analysis.report.document import Chart, Section, Table, format_value
from cruijff_kit.analysis.report.figures import GREY, PALETTE, add_legend_below, make_chart, open_figure, shorten
from cruijff_kit.analysis.report.load import Runs, RunWithResult
from cruijff_kit.analysis.report.wording import SAMPLES, describe_selection, name_units
from cruijff_kit.analysis.table_cells import format_estimate
from cruijff_kit.records.result import Evaluation

BINS = 10
MAX_OTHERS = 8  # configurations besides the best and the base model
MAX_CONFIGURATIONS = 4  # configurations whose samples and groups are shown


@dataclass(eq=False)
class Risks:
    """The risks that one model, a run of a configuration or the base model, gives to the samples of a task."""

    label: str
    scorer: str
    evaluation: Evaluation
    cases: list[tuple[bool, float]]
    """(label is the last option, P(last option)) of each sample."""
    configuration: Configuration | None = None
    """None for the base model."""
    seed: int | None = None
    """Seed of the run, if its configuration has several."""
    level: float = LEVEL
    """Level of the intervals."""

    def estimate(self, metric: str) -> Estimate | None:
        """Estimate a metric of the configuration over its seeds, or of the base model."""
        if self.configuration is None:
            return estimate_evaluation(self.evaluation, self.scorer, metric)
        return estimate(self.configuration, self.evaluation.task, self.scorer, metric, self.level)

    def roc(self) -> list[tuple[float, float]]:
        """Return the ROC curve as (false positive rate, true positive rate); empty for a single class."""
        if len({positive for positive, _ in self.cases}) < 2:
            return []
        from sklearn.metrics import roc_curve

        false, true, _ = roc_curve(*zip(*self.cases, strict=True))
        return [(float(f), float(t)) for f, t in zip(false, true, strict=True)]

    def reliability(self) -> list[tuple[int, int, float, float]]:
        """Return (bin, samples, mean risk, share of positive labels) of non-empty bins (low, high]; 0 is in the first."""
        edges = [i / BINS for i in range(1, BINS)]
        cases_by_bin: dict[int, list[tuple[bool, float]]] = {}
        for positive, risk in self.cases:
            cases_by_bin.setdefault(bisect_left(edges, risk), []).append((positive, risk))
        return [
            (bin_index, len(cases), sum(r for _, r in cases) / len(cases), sum(p for p, _ in cases) / len(cases))
            for bin_index, cases in sorted(cases_by_bin.items())
        ]


def build_calibration(runs: Runs) -> Section:
    """Build the section: for each task with risks a ROC chart, a reliability chart and a table.

    The charts show the best configuration, the base model and some other configurations. A configuration with several seeds
    has a curve for each seed, all in one colour.
    """
    section = Section("calibration", "Ranking and calibration of risks")
    tasks_done: set[str] = set()
    rankings = [f.ranking.configurations for f in runs.families]
    for configurations in rankings or [runs.evaluated_configurations]:
        for task in dict.fromkeys(e.task for c in configurations for r in c.runs for e in r.evaluation):
            if task in tasks_done:
                continue
            risks = _collect_risks(runs, configurations, task)
            if risks:
                tasks_done.add(task)
                name = "calibration" if len(tasks_done) == 1 else f"calibration_{len(tasks_done)}"
                section.blocks += [*_draw_charts(risks, task, name), _make_table(risks, task, name, bool(rankings))]
    if not tasks_done:
        section.absent = _explain_absence(runs)
        return section
    configurations = runs.evaluated_configurations
    if not rankings and len(configurations) > 1:
        text = f"No configuration is the best. Thick lines: the first configuration, {configurations[0].name}"
        omission = f"; {MAX_OTHERS} other configurations are shown." if len(configurations) > MAX_OTHERS + 1 else "."
        section.text.append(text + omission)
    section.text += [
        f"{f.ranking.leader.name} was {describe_selection(f.ranking)}."
        for f in runs.families
        if f.ranking.is_optimistic
    ]
    seed = " (its first seed)" if any(len(c.runs) > 1 for c in configurations) else ""
    section.text.append(
        f"Reliability: mean risk and share of positive labels in {BINS} bins of equal width. The "
        f"{'best' if rankings else 'first'} configuration{seed} has 95% intervals (Wilson{_describe_unit_caveat(runs)}). A "
        "calibrated model lies on the diagonal. ECE is the expected calibration error of the risk (r_ece). It is above 0 "
        "even for a perfectly calibrated model; the table gives its expected value at this number of samples."
    )
    return section


def _describe_unit_caveat(runs: Runs) -> str:
    units = name_units(r.result for r in runs.runs_with_results)
    return "" if units == SAMPLES else f", counting samples, not {units}"


def _explain_absence(runs: Runs) -> str:
    results = [r.result for r in runs.runs_with_results]
    if not any(r.evaluation for r in results):
        return "no run was evaluated"
    if any({"auc", "r_ece"} & {*metrics} for r in results for e in r.evaluation for metrics in e.metrics.values()):
        return "the logs with the probabilities are missing or unreadable, or belong to unfinished runs"
    return "no scorer of these runs gives probabilities (risk_scorer and numeric_risk_scorer do)"


def _collect_risks(runs: Runs, configurations: list[Configuration], task: str) -> list[Risks]:
    """Return the risks of the first configuration (the best, if there is one), the base model, and the others."""
    collected: list[Risks] = []
    for c in configurations[: MAX_OTHERS + 1]:
        for run in runs.runs_of(c):
            evaluation = run.last_evaluation(task)
            run_risks = _read_risks(c.name, evaluation) if evaluation else []
            for risks in run_risks:
                risks.configuration, risks.seed = c, run.value("seed") if len(c.runs) > 1 else None
                risks.level = runs.analysis.interval_level(c, (task, risks.scorer, "auc"))
            collected += run_risks
    if not collected:
        return []
    baselines = (
        _read_risks(f"{BASE_MODEL} {run.result.model}", evaluation)
        for c in configurations
        for run in runs.runs_of(c)
        if (evaluation := run.last_evaluation(task, base_model=True))
    )
    base_model = next((run_risks for run_risks in baselines if run_risks), [])
    best = [r for r in collected if r.configuration is collected[0].configuration]
    return [*best, *base_model, *collected[len(best) :]]


def _read_risks(label: str, evaluation: Evaluation) -> list[Risks]:
    """Return the risks of the first scorer that gives any."""
    from cruijff_kit.evaluation.eval_logs import risks  # inspect-ai

    try:
        risks_by_scorer = risks(evaluation.log)
    except Exception:  # the log is missing or broken: the report omits it
        return []
    return [Risks(label, scorer, evaluation, cases) for scorer, cases in risks_by_scorer.items() if cases][:1]


def _first_seeds(risks: list[Risks]) -> list[Risks]:
    """Keep the first seed of each configuration."""
    return list({r.label: r for r in reversed(risks)}.values())[::-1]


def _make_table(risks: list[Risks], task: str, name: str, is_ranked: bool) -> Table:
    metrics = {"AUC": "auc", "Brier": "brier", "ECE of risk": "r_ece", "ECE of confidence": "c_ece"}
    rows = []
    for r in _first_seeds(risks):
        row: list[Any] = [r.label, len(r.cases), len(r.configuration.runs) if r.configuration else None]
        for metric in metrics.values():
            e = r.estimate(metric)
            row += [e and e.value, e and e.low, e and e.high] + ([e and e.if_calibrated] if "ece" in metric else [])
        rows.append(row)
    header = ["configuration", "samples", "seeds"]
    for label, metric in metrics.items():
        header += [label, f"{label}: low", f"{label}: high"]
        header += [f"{label} if calibrated"] if "ece" in metric else []
    best = {0} if len(rows) > 1 and is_ranked else set()
    return Table(f"{name}_scores", f"Task {task}: ranking and calibration, with 95% intervals", header, rows, best)


def _line_style(risks: list[Risks], index: int) -> dict[str, Any]:
    if risks[index].evaluation.epoch is None:
        return {"color": GREY, "linestyle": "--", "linewidth": 1.6, "zorder": 3}
    colours = [PALETTE[1], *(c for i, c in enumerate(PALETTE) if i != 1)]
    labels = list(dict.fromkeys(r.label for r in risks if r.evaluation.epoch is not None))
    number = labels.index(risks[index].label)
    width = 2.4 if number == 0 else 1.1
    return {
        "color": colours[number % len(colours)],
        "linewidth": width if risks[index].seed is None else width / 2,
        "zorder": 4 if number == 0 else 2,
    }


def _make_label(risks: list[Risks], index: int, metric: str, metric_name: str) -> str | None:
    """Return the configuration's name, and the metric with its interval, for its first seed; None for other seeds."""
    r = risks[index]
    if any(earlier.label == r.label for earlier in risks[:index]):
        return None
    return shorten(r.label, 48) + (
        f", {metric_name} {format_estimate(e, narrow=True)}" if (e := r.estimate(metric)) else ""
    )


def _draw_charts(risks: list[Risks], task: str, name: str) -> list[Chart]:
    return [_draw_roc(risks, task, name), _draw_reliability(risks, task, name)]


def _draw_roc(risks: list[Risks], task: str, name: str) -> Chart:
    curves = [r.roc() for r in risks]
    rows = [[r.label, r.seed, *point] for r, curve in zip(risks, curves, strict=True) for point in curve]
    header = ["configuration", "seed", "false positive rate", "true positive rate"]
    data = Table(f"{name}_roc", f"Task {task}: ROC curves", header, rows)
    with open_figure(5.1, 4.6 + 0.16 * len(_first_seeds(risks))) as fig:
        axes = fig.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        for index, curve in enumerate(curves):
            if curve:
                label = _make_label(risks, index, "auc", "AUC")
                axes.plot(*zip(*curve, strict=True), **_line_style(risks, index), label=label)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_aspect("equal")
        add_legend_below(axes, len(_first_seeds(risks)), 60)
        return make_chart(fig, data, f"{data.caption}. AUC: {_list_values(risks, 'auc')}")


def _draw_reliability(risks: list[Risks], task: str, name: str) -> Chart:
    header = ["configuration", "seed", "bin", "from", "to", "samples", "mean risk", "share positive"]
    rows = [
        [r.label, r.seed, number + 1, number / BINS, (number + 1) / BINS, samples, risk, share]
        for r in risks
        for number, samples, risk, share in r.reliability()
    ]
    data = Table(f"{name}_reliability", f"Task {task}: reliability", header, rows)
    with open_figure(5.1, 4.6 + 0.16 * len(_first_seeds(risks))) as fig:
        axes = fig.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.8, linestyle=":")
        for index, r in enumerate(risks):
            bins, style = r.reliability(), _line_style(risks, index)
            axes.plot([b[2] for b in bins], [b[3] for b in bins], marker="o", markersize=5 if index == 0 else 3.5, **style,
                      label=_make_label(risks, index, "r_ece", "ECE"))  # fmt: skip
            for _, samples, risk, share in bins if index == 0 else []:
                axes.plot([risk, risk], wilson(share, samples, r.level), color=style["color"], linewidth=2, alpha=0.45)
        axes.set(xlabel="mean risk", ylabel="share of positive labels", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.set_aspect("equal")
        add_legend_below(axes, len(_first_seeds(risks)), 60)
        return make_chart(fig, data, f"{data.caption}. ECE: {_list_values(risks, 'r_ece')}")


def _list_values(risks: list[Risks], metric: str) -> str:
    values = [(r.label, r.estimate(metric)) for r in _first_seeds(risks)]
    return "; ".join(f"{label} {format_value(e.value) if e else 'undefined'}" for label, e in values)


def best_configuration_runs(runs: Runs) -> list[list[RunWithResult]]:
    """Return the runs of each family's best configuration, if evaluated, for at most four families.

    Returns:
        A list for each configuration, with a run for each seed. Without a best: those of the first four configurations.
    """
    leaders = [f.ranking.leader for f in runs.families]
    configurations = (leaders or runs.evaluated_configurations)[:MAX_CONFIGURATIONS]
    groups = [runs.runs_of(c) for c in configurations]
    return [group for group in groups if all(r.result.evaluation for r in group)]


def describe_choice(runs: Runs) -> str:
    """Describe which configurations a section covers if there is no best one; empty if there is, or without a choice."""
    number = len(runs.evaluated_configurations)
    if runs.families or number < 2:
        return ""
    selection = "both" if number == 2 else "all"
    if number > MAX_CONFIGURATIONS:
        selection = f"the first {MAX_CONFIGURATIONS} of {number}"
    return f"No configuration is the best; this section covers {selection} configurations."
