"""The report's section on scores: every metric of every task, epoch and run, and a chart over epochs."""

from typing import Any

from cruijff_kit.analysis.comparisons import BASE_MODEL, MetricKey
from cruijff_kit.analysis.configurations import is_finite
from cruijff_kit.analysis.estimates import estimate_evaluation
from cruijff_kit.analysis.headlines import pick_headline
from cruijff_kit.analysis.report.document import Chart, Section, Table, format_value
from cruijff_kit.analysis.report.figures import GREY, PALETTE, add_legend_below, make_chart, open_figure, shorten
from cruijff_kit.analysis.report.load import Runs, RunWithResult
from cruijff_kit.analysis.report.wording import describe_selection, format_interval, name_units
from cruijff_kit.records.result import Evaluation

_FEW = 8  # up to this number each run has its own colour and name


def build_scores(runs: Runs) -> Section:
    """Build the section: a table for each task (a row for each run and epoch), and a chart if there are several epochs."""
    section = Section("scores", "All scores")
    evaluations = [(r, e) for r in runs.runs_with_results for e in (*r.result.baseline, *r.result.evaluation)]
    tasks = list(dict.fromkeys(e.task for _, e in evaluations))
    if not tasks:
        section.absent = "no run was evaluated (eval=none, or no run has reached its evaluation)"
        return section
    if any(len({e.epoch for e in r.result.evaluation}) > 1 for r in runs.runs_with_results):
        section.blocks.append(_draw_epochs(runs, tasks))
    for number, task in enumerate(tasks, 1):
        task_evaluations = [(r, e) for r, e in evaluations if e.task == task]
        section.blocks.append(_make_table(runs, task, task_evaluations, f"scores_{number}_{_make_file_name(task)}"))
    units = name_units(r.result for r in runs.runs_with_results)
    section.text.append(
        f"Epochs are counted from 0. Intervals are 95%, over {units}. Every sample counts: the share scored is the share "
        "of answers that a scorer could read; an unreadable answer counts as wrong, or as the answer of the constant "
        "baseline."
    )
    section.text += [
        f"{f.ranking.leader.name} was {describe_selection(f.ranking)}."
        for f in runs.families
        if f.ranking.is_optimistic
    ]
    return section


def _make_file_name(task: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in task)[:40]


def _make_table(runs: Runs, task: str, evaluations: list[tuple[RunWithResult, Any]], name: str) -> Table:
    columns = list(dict.fromkeys((s, m) for _, e in evaluations for s, values in e.metrics.items() for m in values))
    shares = list(dict.fromkeys(s for _, e in evaluations for s, share in e.coverage.items() if share < 1))
    has_several_scorers = len({s for s, _ in columns}) > 1
    header = ["run", "epoch", "samples"]
    for s, m in columns:
        title = (f"{s} {m}" if has_several_scorers else m).replace("_", " ")
        header += [title, f"{title}: 95%"]
    header += [f"{s} share scored".replace("_", " ") for s in shares]
    rows, known_rows = [], set()
    for run, e in evaluations:
        if e.epoch is None:  # the base model: one row for the same answers
            key = repr((e.metrics, e.samples))
            if key in known_rows:
                continue
            known_rows.add(key)
        values = [
            v for s, m in columns for v in (e.metrics.get(s, {}).get(m), _format_interval(runs, run, e, (task, s, m)))
        ]
        label = run.label if e.epoch is not None else f"{BASE_MODEL} {run.result.model}"
        epoch = BASE_MODEL if e.epoch is None else e.epoch
        rows.append([label, epoch, e.samples, *values, *(e.coverage.get(s) for s in shares)])
    if chance := next((e.chance for _, e in evaluations if e.chance), None):
        chance_values = [v for s, m in columns for v in (chance.get(s, {}).get(m), None)]
        rows.append(
            ["chance (constant answer)", None, evaluations[0][1].samples, *chance_values, *(None for _ in shares)]
        )
    indices = [i for i in range(len(header)) if i < 3 or any(row[i] is not None for row in rows)]
    table = [[row[i] for i in indices] for row in rows]
    return Table(name, f"Task {task}: all metrics", [header[i] for i in indices], table)


def _format_interval(runs: Runs, run: RunWithResult, e: Evaluation, metric_key: MetricKey) -> str | None:
    return format_interval(estimate_evaluation(e, *metric_key[1:], runs.interval_level(run, e, metric_key)))


def _draw_epochs(runs: Runs, tasks: list[str]) -> Chart:
    """Draw a panel for each scorer of each task, with the metric of the results table; the base model is at the left."""
    results = [r.result for r in runs.runs_with_results]
    scorers = [
        (t, s)
        for t in tasks
        for s in dict.fromkeys(s for r in results for e in r.evaluation if e.task == t for s in e.metrics)
    ]
    headlines = [(t, s, pick_headline(results, t, s)) for t, s in scorers][:6]
    rows: list[list[Any]] = []
    for r in runs.runs_with_results:
        for e in (*r.result.baseline, *r.result.evaluation):
            for task, scorer, metric in headlines:
                value = e.metrics.get(scorer, {}).get(metric) if e.task == task else None
                if is_finite(value):
                    rows.append([r.label, task, scorer, metric, -1 if e.epoch is None else e.epoch, value])
    data = Table(
        "epochs", "Scores over epochs", ["run", "task", "scorer", "metric", "epoch (-1: base model)", "value"], rows
    )
    columns = min(2, len(headlines))
    lines = -(-len(headlines) // columns)
    labels = list(dict.fromkeys(row[0] for row in rows))
    has_few = len(labels) <= _FEW
    with open_figure(4.6 * columns + 0.4, 2.9 * lines + (0.17 * len(labels) if has_few else 0.2)) as fig:
        panels = [*fig.subplots(lines, columns, squeeze=False).flat]
        for axes, (task, scorer, metric) in zip(panels, headlines, strict=False):
            task_rows = [row for row in rows if row[1:4] == [task, scorer, metric]]
            _draw_panel(axes, task_rows, labels, runs, has_few)
            axes.set(title=shorten(f"{task}, {scorer}: {metric.replace('_', ' ')}", 60), xlabel="epoch")
        for axes in panels[len(headlines) :]:
            axes.set_visible(False)
        if has_few and len(labels) > 1:
            add_legend_below(panels[0], len(labels), max(len(shorten(label, 60)) for label in labels))
        alt = f"Scores over epochs of {len(labels)} runs: " + "; ".join(f"{t} {s} {m}" for t, s, m in headlines)
        values = [row[5] for row in rows]
        alt += f"; values are between {format_value(min(values))} and {format_value(max(values))}."
        return make_chart(fig, data, alt)


def _draw_panel(axes: Any, rows: list[list[Any]], labels: list[str], runs: Runs, has_few: bool) -> None:
    best_run = runs.families[0].best_run if runs.families else None
    for i, label in enumerate(labels):
        line = sorted((row[4], row[5]) for row in rows if row[0] == label)
        is_best = best_run is not None and best_run.label == label and len(labels) > 1
        colour = PALETTE[i] if has_few else PALETTE[1] if is_best else GREY
        if line:
            width = 2.4 if is_best else 1.3 if has_few else 0.7
            style = {"color": colour, "linewidth": width, "zorder": 3 if is_best else 2, "label": shorten(label, 60)}
            axes.plot(*zip(*line, strict=True), "o-" if has_few or is_best else "-", markersize=4, **style)
    epochs = sorted({row[4] for row in rows})
    if len(epochs) <= 12:
        axes.set_xticks(epochs, [BASE_MODEL if e < 0 else str(e) for e in epochs])
