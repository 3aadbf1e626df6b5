"""Read the runs below a folder once: states, results, manifests and the analysis.

A folder that was moved or copied is read at its new place: logs in it come before the paths in its results.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cruijff_kit.analysis.comparisons import MetricKey
from cruijff_kit.analysis.configurations import Configuration
from cruijff_kit.analysis.intervals import LEVEL
from cruijff_kit.analysis.rankings import Ranking
from cruijff_kit.analysis.sweep import Analysis, analyse
from cruijff_kit.records.result import Evaluation, RunResult, read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.sweep_manifest import RunEntry, SweepManifest, find_sweep_manifests, read_sweep_manifest
from cruijff_kit.slurm.run_states import RunInfo, RunRef, collect_states, find_runs
from cruijff_kit.util.errors import UserError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(eq=False)
class ReportRun:
    """One run."""

    label: str
    """Its name; where names repeat, its path."""
    folder: Path
    info: RunInfo
    result: RunResult | None = None
    """None if result.json is missing or unreadable."""
    entry: RunEntry | None = None
    """The run in the manifest of its sweep."""
    result_error: str = ""
    """Why result.json cannot be read."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return config.yaml, else {"torchtune": torchtune.yaml}; empty if both are missing."""
        for name in ("config.yaml", "torchtune.yaml"):
            try:
                tree = yaml.load((self.folder / name).read_text(encoding="utf-8"), Loader=_LOADER)
            except (OSError, ValueError, yaml.YAMLError):
                continue
            if isinstance(tree, dict):
                return tree if name == "config.yaml" else {"torchtune": tree}
        return {}

    @property
    def is_done(self) -> bool:
        """Return whether the run has finished without an error."""
        return self.result is not None and self.result.status == "done"

    @property
    def swept(self) -> dict[str, Any]:
        """Return the settings that vary in the run's sweep."""
        return self.result.swept if self.result else self.entry.swept if self.entry else {}

    def value(self, key: str) -> Any:
        """Return the value of a swept setting, also where another sweep varies it; None if unknown."""
        return self.swept.get(key, self.result.settings.get(key) if self.result else None)

    def last_evaluation(self, task: str, base_model: bool = False) -> Evaluation | None:
        """Return the evaluation of a task after the last epoch; None if there is none."""
        evaluations = (self.result.baseline if base_model else self.result.evaluation) if self.result else []
        return next((e for e in reversed(evaluations) if e.task == task), None)


@dataclass(eq=False)
class RunWithResult(ReportRun):
    """A run, finished or failed, whose result.json could be read."""

    result: RunResult


@dataclass(eq=False)
class Family:
    """Finished runs with the same objective (task, scorer and metric), by configuration."""

    ranking: Ranking
    """The configurations, the best first."""
    runs: list[RunWithResult]
    """The runs of the configurations, in the order of the ranking and by seed."""

    @property
    def objective(self) -> str:
        """Return the objective's name."""
        return self.ranking.chosen_by

    @property
    def source(self) -> tuple[str, str, str] | None:
        """Return (task, scorer, metric); None for a loss."""
        return self.ranking.source

    @property
    def best_run(self) -> RunWithResult:
        """Return the run of the best configuration's first seed."""
        return self.runs[0]

    @property
    def name(self) -> str:
        """Return the objective in words."""
        return name_objective(self.objective, self.source)


@dataclass(eq=False)
class Runs:
    """Every run below a folder."""

    folder: Path
    all_runs: list[ReportRun]
    manifests: list[SweepManifest]
    slurm_error: str | None = None
    """Why SLURM did not give the states of the runs."""

    @cached_property
    def runs_with_results(self) -> list[RunWithResult]:
        """Return the runs with a result.json, finished or failed."""
        return [r for r in self.all_runs if isinstance(r, RunWithResult)]

    @cached_property
    def analysis(self) -> Analysis:
        """Return the configurations, rankings and comparisons of the results."""
        return analyse([r.result for r in self.runs_with_results])

    @cached_property
    def families(self) -> list[Family]:
        """Return the finished runs by objective, the largest family first."""
        return [Family(r, [run for c in r.configurations for run in self.runs_of(c)]) for r in self.analysis.rankings]

    def runs_of(self, configuration: Configuration) -> list[RunWithResult]:
        """Return the runs of a configuration, by seed."""
        return [next(r for r in self.runs_with_results if r.result is result) for result in configuration.runs]

    @cached_property
    def best_runs(self) -> list[RunWithResult]:
        """Return the runs of the best configurations of each family with several configurations."""
        rankings = [f.ranking for f in self.families if len(f.ranking.configurations) > 1]
        return [run for ranking in rankings for c in ranking.best for run in self.runs_of(c)]

    def interval_level(self, run: RunWithResult, evaluation: Evaluation, metric_key: MetricKey) -> float:
        """Return the level of an interval of one run: higher where its samples chose the run's configuration."""
        c = self.analysis.find_configuration(run.result)
        is_last = evaluation is run.last_evaluation(evaluation.task)
        return self.analysis.interval_level(c, metric_key) if c is not None and is_last else LEVEL

    @cached_property
    def evaluated_configurations(self) -> list[Configuration]:
        """Return the configurations whose runs were all evaluated on tasks."""
        return [c for c in self.analysis.configurations if all(r.evaluation for r in c.runs)]

    def count_states(self) -> Counter[str]:
        """Return state -> number of runs."""
        return Counter(r.info.state for r in self.all_runs)


def name_objective(objective: str, source: tuple[str, str, str] | None) -> str:
    """Name an objective, or (task, scorer, metric), in words: "match accuracy (risk)"."""
    if source is None:
        return objective.replace("_", " ")
    return f"{source[1]} {source[2]} ({source[0]})".replace("_", " ")


def read_runs(folder: Path) -> Runs:
    """Read every run of a run's folder, a sweep's folder, or any folder above, in order of start.

    Raises:
        UserError: no such folder, or no run in it.
    """
    run_refs = find_runs(folder)
    infos, slurm_error = collect_states(run_refs)
    runs = [_read_run(k, v) for k, v in zip(run_refs, infos, strict=True)]
    runs.sort(key=lambda r: (r.result.started if r.result else "~", r.label))
    for label, times in Counter(r.label for r in runs).items():
        for r in runs:
            if times > 1 and r.label == label:
                r.label = _relative_label(r.folder, folder)
    places = dict.fromkeys([*find_sweep_manifests(folder), *(k.sweep_dir for k in run_refs if k.sweep_dir)])
    manifests = [manifest for place in places if (manifest := read_sweep_manifest(place))]
    return Runs(folder, runs, manifests, slurm_error)


def _relative_label(run: Path, folder: Path) -> str:
    is_below = run.is_relative_to(folder.absolute())
    return str(run.relative_to(folder.absolute())) if is_below else f"{run.parent.name}/{run.name}"


def _read_run(ref: RunRef, info: RunInfo) -> ReportRun:
    folder = RunFolder(ref.folder)
    if not folder.result.exists():
        return ReportRun(info.name, ref.folder, info, entry=ref.entry)
    try:
        result = read_result(folder.result)
    except (UserError, OSError) as error:
        return ReportRun(info.name, ref.folder, info, entry=ref.entry, result_error=str(error))
    for e in result.evaluation:
        e.log = _find_log(folder.eval, e.log)
    for e in result.baseline:
        e.log = _find_log(folder.base_model_eval, e.log)
    return RunWithResult(result.name, ref.folder, info, result, ref.entry)


def _find_log(folder: Path, log: str) -> str:
    path = folder / Path(log).name
    return str(path) if log and path.is_file() else log
