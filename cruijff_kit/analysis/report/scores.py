"""The report's section on scores: every metric of every task, epoch and run, and lines over epochs."""

from typing import Any

from cruijff_kit.analysis.comparisons import MetricKey
from cruijff_kit.analysis.estimates import estimate_evaluation
from cruijff_kit.analysis.headlines import pick_headline
from cruijff_kit.analysis.report.document import Chart, Section, Table, shown
from cruijff_kit.analysis.report.figures import GREY, PALETTE, chart, figure, fitted, legend_below
from cruijff_kit.analysis.report.load import Run, Runs, finite
from cruijff_kit.analysis.report.wording import range_in_words, selection_in_words, units_of
from cruijff_kit.records.result import Evaluation

_FEW = 8
BASE_MODEL = "base model"


def scores(runs: Runs) -> Section:
    """A table a task (a row a run and epoch), and a chart where several epochs were evaluated."""
    section = Section("scores", "Every score")
    cells = [(r, e) for r in runs.with_result for e in (*r.result.baseline, *r.result.evaluation)]
    tasks = list(dict.fromkeys(e.task for _, e in cells))
    if not tasks:
        section.absent = "no run was evaluated (eval=none, or no run has got that far)"
        return section
    if any(len({e.epoch for e in r.result.evaluation}) > 1 for r in runs.with_result):
        section.blocks.append(_over_epochs(runs, tasks))
    for number, task in enumerate(tasks, 1):
        own = [(r, e) for r, e in cells if e.task == task]
        section.blocks.append(_table(runs, task, own, f"scores_{number}_{_file_name(task)}"))
    section.text.append(
        f"Epochs are counted from 0. Intervals are 95%, over {units_of(r.result for r in runs.with_result)}. Every sample "
        "counts: shares scored are those of the samples that a scorer could read, the others count as wrong, or as the "
        "constant baseline does."
    )
    section.text += [
        f"{f.ranking.leader.name} was {selection_in_words(f.ranking)}."
        for f in runs.families
        if f.ranking.is_optimistic
    ]
    return section


def _file_name(task: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_") else "_" for c in task)[:40]


def _table(runs: Runs, task: str, cells: list[tuple[Run, Any]], name: str) -> Table:
    columns = list(dict.fromkeys((s, m) for _, e in cells for s, values in e.metrics.items() for m in values))
    shares = list(dict.fromkeys(s for _, e in cells for s, share in e.coverage.items() if share < 1))
    several = len({s for s, _ in columns}) > 1
    header = ["run", "epoch", "samples"]
    for s, m in columns:
        words = (f"{s} {m}" if several else m).replace("_", " ")
        header += [words, f"{words}: 95%"]
    header += [f"{s} share scored".replace("_", " ") for s in shares]
    rows, seen = [], set()
    for run, e in cells:
        if e.epoch is None:  # the base model: of the same answers one row
            same = repr((e.metrics, e.samples))
            if same in seen:
                continue
            seen.add(same)
        values = [v for s, m in columns for v in (e.metrics.get(s, {}).get(m), _interval(runs, run, e, (task, s, m)))]
        who = run.label if e.epoch is not None else f"base model {run.result.model}"
        epoch = BASE_MODEL if e.epoch is None else e.epoch
        rows.append([who, epoch, e.samples, *values, *(e.coverage.get(s) for s in shares)])
    if chance := next((e.chance for _, e in cells if e.chance), None):
        known = [v for s, m in columns for v in (chance.get(s, {}).get(m), None)]
        rows.append(["chance (constant answer)", None, cells[0][1].samples, *known, *(None for _ in shares)])
    kept = [i for i in range(len(header)) if i < 3 or any(row[i] is not None for row in rows)]
    return Table(name, f"Task {task}: every metric", [header[i] for i in kept], [[r[i] for i in kept] for r in rows])


def _interval(runs: Runs, run: Run, e: Evaluation, measured: MetricKey) -> str | None:
    return range_in_words(estimate_evaluation(e, *measured[1:], runs.level_of(run, e, measured)))


def _over_epochs(runs: Runs, tasks: list[str]) -> Chart:
    """A panel for each task's scorers, with the metric that tables show; the base model in front."""
    results = [r.result for r in runs.with_result]
    scorers = [
        (t, s)
        for t in tasks
        for s in dict.fromkeys(s for r in results for e in r.evaluation if e.task == t for s in e.metrics)
    ]
    wanted = [(t, s, pick_headline(results, t, s)) for t, s in scorers][:6]
    rows: list[list[Any]] = []
    for r in runs.with_result:
        for e in (*r.result.baseline, *r.result.evaluation):
            for task, scorer, metric in wanted:
                value = e.metrics.get(scorer, {}).get(metric) if e.task == task else None
                if finite(value):
                    rows.append([r.label, task, scorer, metric, -1 if e.epoch is None else e.epoch, value])
    data = Table(
        "epochs", "Scores over epochs", ["run", "task", "scorer", "metric", "epoch (-1: base model)", "value"], rows
    )
    columns = min(2, len(wanted))
    lines = -(-len(wanted) // columns)
    labels = list(dict.fromkeys(row[0] for row in rows))
    few = len(labels) <= _FEW
    with figure(4.6 * columns + 0.4, 2.9 * lines + (0.17 * len(labels) if few else 0.2)) as drawn:
        panels = [*drawn.subplots(lines, columns, squeeze=False).flat]
        for axes, (task, scorer, metric) in zip(panels, wanted, strict=False):
            own = [row for row in rows if row[1:4] == [task, scorer, metric]]
            _panel(axes, own, labels, runs, few)
            axes.set(title=fitted(f"{task}, {scorer}: {metric.replace('_', ' ')}", 60), xlabel="epoch")
        for axes in panels[len(wanted) :]:
            axes.set_visible(False)
        if few and len(labels) > 1:
            legend_below(panels[0], len(labels), max(len(fitted(label, 60)) for label in labels))
        alt = f"Scores over epochs of {len(labels)} runs: " + "; ".join(f"{t} {s} {m}" for t, s, m in wanted)
        return chart(
            drawn,
            data,
            f"{alt}; values lie between {shown(min(r[5] for r in rows))} and {shown(max(r[5] for r in rows))}.",
        )


def _panel(axes: Any, rows: list[list[Any]], labels: list[str], runs: Runs, few: bool) -> None:
    best = runs.families[0].best if runs.families else None
    for i, label in enumerate(labels):
        line = sorted((row[4], row[5]) for row in rows if row[0] == label)
        is_best = best is not None and best.label == label and len(labels) > 1
        colour = PALETTE[i] if few else PALETTE[1] if is_best else GREY
        if line:
            width = 2.4 if is_best else 1.3 if few else 0.7
            form = {"color": colour, "linewidth": width, "zorder": 3 if is_best else 2, "label": fitted(label, 60)}
            axes.plot(*zip(*line, strict=True), "o-" if few or is_best else "-", markersize=4, **form)
    epochs = sorted({row[4] for row in rows})
    if len(epochs) <= 12:
        axes.set_xticks(epochs, [BASE_MODEL if e < 0 else str(e) for e in epochs])
