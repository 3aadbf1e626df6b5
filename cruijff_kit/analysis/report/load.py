"""What a report is about, read once: the runs below a folder with their states and results, their manifests, and the best.

A folder that was moved or copied is read where it lies: its own logs come before those that its results name.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from cruijff_kit.analysis.comparisons import MetricKey
from cruijff_kit.analysis.configurations import Configuration, is_finite
from cruijff_kit.analysis.intervals import LEVEL
from cruijff_kit.analysis.rankings import Ranking
from cruijff_kit.analysis.sweep import Analysis, analyse
from cruijff_kit.records.result import Evaluation, RunResult, read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.sweep_manifest import RunEntry, SweepManifest, find_sweep_manifests, read_sweep_manifest
from cruijff_kit.slurm.run_states import RunInfo, RunRef, collect_states, find_runs
from cruijff_kit.util.errors import UserError

SEED = "seed"
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(eq=False)
class Run:
    """One run."""

    label: str
    """Its name, with its folder where names repeat."""
    folder: Path
    info: RunInfo
    result: RunResult | None = None
    """None if there is none, or it cannot be read."""
    entry: RunEntry | None = None
    """Of its sweep's manifest."""
    unreadable: str = ""
    """What is wrong with its result.json."""

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.yaml, else {"torchtune": torchtune.yaml}; empty where neither is there."""
        for name in ("config.yaml", "torchtune.yaml"):
            try:
                tree = yaml.load((self.folder / name).read_text(encoding="utf-8"), Loader=_LOADER)
            except (OSError, ValueError, yaml.YAMLError):
                continue
            if isinstance(tree, dict):
                return tree if name == "config.yaml" else {"torchtune": tree}
        return {}

    @property
    def done(self) -> bool:
        """Whether it has finished."""
        return self.result is not None and self.result.status == "done"

    @property
    def swept(self) -> dict[str, Any]:
        """What varies in its sweep."""
        return self.result.swept if self.result else self.entry.swept if self.entry else {}

    def value(self, key: str) -> Any:
        """What a setting that varies somewhere is in this run; None where it is not known."""
        return self.swept.get(key, self.result.settings.get(key) if self.result else None)

    def last(self, task: str, base_model: bool = False) -> Evaluation | None:
        """A task's cell, of several epochs the last."""
        cells = (self.result.baseline if base_model else self.result.evaluation) if self.result else []
        return next((e for e in reversed(cells) if e.task == task), None)


@dataclass(eq=False)
class Family:
    """Finished runs with the same objective (task, scorer and metric), by configuration."""

    ranking: Ranking
    """Their configurations, the best first."""
    ranked: list[Run]
    """The runs of these, by seed."""

    @property
    def objective(self) -> str:
        """Its name."""
        return self.ranking.chosen_by

    @property
    def source(self) -> tuple[str, str, str] | None:
        """(task, scorer, metric); None for a loss."""
        return self.ranking.source

    @property
    def higher(self) -> bool:
        """Whether more is better."""
        return self.ranking.is_higher_better

    @property
    def best(self) -> Run:
        """The first seed's run of the best configuration."""
        return self.ranked[0]

    @property
    def name(self) -> str:
        """The objective in words."""
        return objective_name(self.objective, self.source)


@dataclass(eq=False)
class Runs:
    """Every run below a folder."""

    folder: Path
    all: list[Run]
    manifests: list[SweepManifest]
    trouble: str | None = None
    """Why SLURM could not be asked about them."""

    @cached_property
    def with_result(self) -> list[Run]:
        """Those with a result.json, finished or not."""
        return [r for r in self.all if r.result is not None]

    @cached_property
    def analysis(self) -> Analysis:
        """Configurations, rankings and comparisons of the results."""
        return analyse([r.result for r in self.with_result])

    @cached_property
    def families(self) -> list[Family]:
        """Finished runs by what their objective is, the largest family first."""
        return [Family(r, [run for c in r.configurations for run in self.runs_of(c)]) for r in self.analysis.rankings]

    def runs_of(self, configuration: Configuration) -> list[Run]:
        """The runs of a configuration, by seed."""
        return [next(r for r in self.all if r.result is result) for result in configuration.runs]

    @cached_property
    def best(self) -> list[Run]:
        """The runs of the best configurations of each family that has several."""
        return [
            run
            for f in self.families
            if len(f.ranking.configurations) > 1
            for c in f.ranking.best
            for run in self.runs_of(c)
        ]

    def level_of(self, run: Run, cell: Evaluation, measured: MetricKey) -> float:
        """Level of a number of one run: higher for the best's, where the samples that it is of chose it."""
        c = self.analysis.find_configuration(run.result)
        is_last = cell is not None and cell is run.last(cell.task)
        return self.analysis.interval_level(c, measured) if c is not None and is_last else LEVEL

    @cached_property
    def evaluated(self) -> list[Configuration]:
        """The configurations whose runs were all evaluated on tasks."""
        return [c for c in self.analysis.configurations if all(r.evaluation for r in c.runs)]

    def states(self) -> Counter[str]:
        """State -> runs."""
        return Counter(r.info.state for r in self.all)


def objective_name(objective: str, source: tuple[str, str, str] | None) -> str:
    """An objective, or (task, scorer, metric), in words: "match accuracy (risk)"."""
    if source is None:
        return objective.replace("_", " ")
    return f"{source[1]} {source[2]} ({source[0]})".replace("_", " ")


def finite(value: Any) -> bool:
    """Whether it is a number that can be compared."""
    return is_finite(value)


def read_runs(folder: Path) -> Runs:
    """Every run of a run's folder, of a sweep's, or of any folder above, in the order of their starts.

    Raises:
        UserError: no such folder, or no run in it.
    """
    known = find_runs(folder)
    infos, trouble = collect_states(known)
    runs = [_read(k, v) for k, v in zip(known, infos, strict=True)]
    runs.sort(key=lambda r: (r.result.started if r.result else "~", r.label))
    for label, times in Counter(r.label for r in runs).items():
        for r in runs:
            if times > 1 and r.label == label:
                r.label = _place(r.folder, folder)
    places = dict.fromkeys([*find_sweep_manifests(folder), *(k.sweep_dir for k in known if k.sweep_dir)])
    manifests = [manifest for place in places if (manifest := read_sweep_manifest(place))]
    return Runs(folder, runs, manifests, trouble)


def _place(run: Path, folder: Path) -> str:
    within = run.is_relative_to(folder.absolute())
    return str(run.relative_to(folder.absolute())) if within else f"{run.parent.name}/{run.name}"


def _read(known: RunRef, info: RunInfo) -> Run:
    path = RunFolder(known.folder).result
    run = Run(info.name, known.folder, info, entry=known.entry)
    if path.exists():
        try:
            run.result = read_result(path)
        except (UserError, OSError) as error:
            run.unreadable = str(error)
    if run.result:
        run.label = run.result.name
        for e in run.result.evaluation:
            e.log = _found(known.folder / "eval", e.log)
        for e in run.result.baseline:
            e.log = _found(known.folder / "eval" / "base_model", e.log)
    return run


def _found(folder: Path, log: str) -> str:
    own = folder / Path(log).name
    return str(own) if log and own.is_file() else log
