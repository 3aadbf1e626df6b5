"""The report's first section: the question, the runs, and the commands to repeat them."""

import shlex
from typing import Any

import yaml

from cruijff_kit.analysis.configurations import Configuration, last_evaluation
from cruijff_kit.analysis.estimates import estimate_evaluation, estimate_loss
from cruijff_kit.analysis.rankings import find_source
from cruijff_kit.analysis.report.document import Section, Table, format_count, join_words, plain_value
from cruijff_kit.analysis.report.load import ReportRun, Runs, RunWithResult
from cruijff_kit.analysis.report.wording import format_interval, format_percent
from cruijff_kit.config.overrides import typed_arguments
from cruijff_kit.records.sweep_manifest import format_command

_ORDER = ("done", "running", "evaluating", "queued", "interrupted", "cancelled", "failed")


def build_overview(runs: Runs) -> Section:
    """Build the section: the question, hypothesis and evaluation plan of each sweep, and a table of all runs."""
    section = Section("overview", "What was run")
    plans = [(manifest, name) for manifest in runs.manifests for name in ("question", "hypothesis", "evaluation")]
    labels = {"question": "Question", "hypothesis": "Hypothesis", "evaluation": "Evaluation plan"}
    section.text = list(dict.fromkeys(f"{labels[n]}: {getattr(m, n)}" for m, n in plans if getattr(m, n)))
    if runs.slurm_error:
        section.text.append(
            f"SLURM does not answer ({runs.slurm_error}); the states are those that the runs last reported."
        )
    keys = find_swept_keys(runs.all_runs)
    rows = [
        [r.label, r.info.state, *(plain_value(r.value(k)) for k in keys), *_outcome_cells(runs, r)]
        for r in runs.all_runs
    ]
    header = ["run", "state", *keys, "objective", "value", "value: 95%", "loss", "validation loss",
              "validation loss: 95%", "started (UTC)", "folder"]  # fmt: skip
    optional = ("objective", "value", "value: 95%", "validation loss", "validation loss: 95%")
    columns = [i for i, name in enumerate(header) if name not in optional or any(row[i] is not None for row in rows)]
    best = {i for i, r in enumerate(runs.all_runs) if r in runs.best_runs}
    levels = [format_percent(f.ranking.level) for f in runs.families if f.ranking.is_optimistic]
    caption = "Every run" + (
        f" (intervals: 95%, but {join_words(levels, 'or')} for the best on the split that chose it)" if levels else ""
    )
    table = [[row[i] for i in columns] for row in rows]
    section.blocks.append(Table("runs", caption, [header[i] for i in columns], table, best))
    return section


def describe_states(runs: Runs) -> str:
    """Count the runs by state: "8 runs: 6 done, 2 failed"."""
    counts = runs.count_states()
    states = sorted(counts, key=lambda s: _ORDER.index(s) if s in _ORDER else len(_ORDER))
    return f"{format_count(len(runs.all_runs), 'run')}: {', '.join(f'{counts[s]} {s}' for s in states)}"


def list_commands(runs: Runs) -> list[str]:
    """Return the command lines of the sweeps; of a single run without a manifest, the one that Hydra recorded."""
    lines = [format_command(manifest) for manifest in runs.manifests]
    if not lines and len(runs.all_runs) == 1:
        lines = [line for line in [_read_command(runs.all_runs[0])] if line]
    return list(dict.fromkeys(lines))


def _read_command(run: ReportRun) -> str | None:
    """Return the command of a single run from Hydra's record; None if there is none."""
    try:
        hydra = yaml.safe_load((run.folder / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))["hydra"]
        arguments = typed_arguments(hydra)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    return f"python -m cruijff_kit.train {shlex.join(arguments)}".rstrip()


def make_title(runs: Runs) -> str:
    """Return the names of the experiments; without any, the folder's name."""
    names = dict.fromkeys(r.result.experiment for r in runs.runs_with_results)
    names |= dict.fromkeys(manifest.experiment for manifest in runs.manifests)
    return (
        join_words([*names][:3]) + (" and others" if len(names) > 3 else "") if names else runs.folder.absolute().name
    )


def find_swept_keys(runs: list[ReportRun]) -> list[str]:
    """Return the settings that are swept over in any of the runs, in order of appearance."""
    return list(dict.fromkeys(k for r in runs for k in r.swept))


def _outcome_cells(runs: Runs, run: ReportRun) -> list[Any]:
    """Return objective, losses, start and folder; intervals are over validation rows, or over test units for a score."""
    if not isinstance(run, RunWithResult):
        return [None, None, None, run.info.loss, None, None, None, str(run.folder)]
    r = run.result
    validation = estimate_loss(Configuration(r.name, {}, [r]), "validation_loss")
    source, score = find_source(r), None
    if source is not None:
        evaluation = last_evaluation(r, source[0])
        assert evaluation is not None, "the source is a metric of the run's evaluation"
        score = estimate_evaluation(evaluation, *source[1:], runs.interval_level(run, evaluation, source))
    elif r.objective_name == "validation_loss":
        score = validation
    losses = [r.training.get("loss"), r.training.get("validation_loss")]
    started = r.started[:19].replace("T", " ")
    interval = format_interval(score)
    return [r.objective_name, r.objective, interval, *losses, format_interval(validation), started, str(run.folder)]
