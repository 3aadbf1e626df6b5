"""dry_run=true: work out what a command would do, and print it, without reading any weights."""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from cruijff_kit.analysis.power import DetectableDifference, detectable_difference, detectable_error
from cruijff_kit.config.identity import configuration_hash
from cruijff_kit.config.run import RunConfig
from cruijff_kit.runs.estimate import CostEstimate, check_budget, estimate_runs, sum_estimates, summarise_estimates
from cruijff_kit.runs.multi_lora_runs import PlannedGroup, plan_groups
from cruijff_kit.runs.plan import RunPlan, plan_run
from cruijff_kit.sweep.slurm_jobs import make_job_requests
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import ClusterError, UserError
from cruijff_kit.util.format import format_duration, format_size

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class PlannedRun:
    """A run that is checked but not started."""

    config: RunConfig
    swept: dict[str, Any]
    """The values that distinguish it in its sweep."""
    plan: RunPlan
    estimate: CostEstimate

    def to_dict(self) -> dict[str, Any]:
        """Return the run as in --json: name, folder, swept, all of plan.RunPlan, the estimate, the config of the recipe."""
        where = {"name": self.config.run_name, "folder": self.config.output_dir, "swept": self.swept}
        planned = dataclasses.asdict(self.plan) | {"estimate": dataclasses.asdict(self.estimate)}
        return where | planned | {"torchtune": self.config.torchtune}


@dataclass(frozen=True)
class PlannedArray:
    """A job array that is not submitted."""

    what: str
    """Its runs and its request, in one line."""
    script: str
    """The sbatch script."""
    test_only: str
    """The answer of `sbatch --test-only`."""
    error: ClusterError | None = None
    """SLURM's refusal."""

    def to_dict(self) -> dict[str, Any]:
        """Return the array as in --json."""
        answers = {"test_only": self.test_only, "refused": self.error is not None}
        return {"what": self.what, "script": self.script} | answers


def show(runs: list[tuple[RunConfig, dict[str, Any]]], folder: Path) -> None:
    """Print (or record, for --json) the steps, tokens and estimates of every run, the torchtune configs, and what would be
    submitted to SLURM.

    Args:
        runs: config and swept values of each run.
        folder: the folder that the runs would have.
    Raises:
        UserError: a run that cannot work.
        ClusterError: SLURM would refuse an array.
    """
    checked = [(config, plan_run(config)) for config, _ in runs]
    of_runs = estimate_runs(checked, folder)
    planned = [PlannedRun(*run, plan, e) for run, (_, plan), e in zip(runs, checked, of_runs, strict=True)]
    groups = plan_groups([config for config, _ in runs], [e.seconds for e in of_runs]) if len(runs) > 1 else []
    submitted = [run for run in planned if run.config.slurm.submit]
    arrays = planned_arrays([run.config for run in submitted], folder.absolute(), [run.estimate for run in submitted])
    detectable = detectable_differences(planned)
    if json_output.is_enabled():
        json_output.record(detectable_difference={task: d.to_dict() for task, d in detectable.items()})
        json_output.record(
            dry_run=True,
            folder=str(folder.absolute()),
            estimate=sum_estimates(of_runs) | describe_budget(runs[0][0], of_runs),
        )
        json_output.append(runs=[run.to_dict() for run in planned], arrays=[array.to_dict() for array in arrays])
        names = [run.config.run_name for run in planned]
        json_output.append(
            groups=[{"runs": [names[n] for n in g.runs], "at_once": g.at_once, "why": g.why} for g in groups]
        )
    else:
        _print(planned, arrays, groups, detectable)
    for array in arrays:
        if array.error is not None:
            raise array.error


def planned_arrays(configs: list[RunConfig], folder: Path, expected: list[CostEstimate | None]) -> list[PlannedArray]:
    """Plan the arrays that the runs of these configs would be submitted as, and try each with `sbatch --test-only`.

    Raises:
        ClusterError: SLURM does not answer.
    """
    if not configs:
        return []
    from cruijff_kit.slurm import submit

    jobs = make_job_requests(configs, [Path(c.output_dir) for c in configs], expected)
    planned = []
    for array in submit.make_arrays(jobs):
        try:
            answer, refusal = submit.try_with_sbatch(array, folder, os.getcwd()), None
        except ClusterError as error:
            answer, refusal = f"refused: {error}", error
        planned.append(PlannedArray(array.summary(), submit.format_script(array, folder), answer, refusal))
    return planned


def detectable_differences(runs: list[PlannedRun]) -> dict[str, DetectableDifference]:
    """Return the smallest difference that comparisons of these runs could find, by task."""
    seeds = Counter(configuration_hash(run.config) for run in runs)
    differences = {}
    plan, compared, of_each = runs[0].plan, max(2, len(seeds)), min(seeds.values())
    for task in (*plan.accuracy_tasks, *plan.error_tasks):
        find = detectable_difference if task in plan.accuracy_tasks else detectable_error
        items = min(run.plan.samples.get(task, 0) for run in runs)
        if items:
            differences[task] = find(items, compared, seeds=of_each)
    return differences


def describe_budget(config: RunConfig, of_runs: list[CostEstimate]) -> dict[str, Any]:
    """Return max_gpu_hours, and whether it would stop these runs."""
    try:
        check_budget(config, of_runs)
    except UserError:
        return {"max_gpu_hours": config.max_gpu_hours, "stopped": True}
    return {"max_gpu_hours": config.max_gpu_hours, "stopped": False}


def _print(
    runs: list[PlannedRun],
    arrays: list[PlannedArray],
    groups: list[PlannedGroup],
    detectable: dict[str, DetectableDifference],
) -> None:
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 200, highlight=False)
    _print_runs(runs, console)
    for task, difference in detectable.items():
        console.print(f"{task}: {difference}", markup=False, soft_wrap=True)
    if len(runs) > 1 and len({configuration_hash(run.config) for run in runs}) == len(runs):
        further = [run.estimate for run in runs for _ in {1, 2, 3} - {run.config.seed}]
        more = format_duration(sum_estimates(further)["seconds"])
        console.print(f"each configuration has one seed, so runs are compared; seed=1,2,3 would take {more} more")
    for group in groups:
        names = [runs[n].config.run_name for n in group.runs]
        summary = f"{group.summary(len(runs))}: {'; '.join(names)}"
        console.print(f"{names[0]} trains alone: {group.why}" if group.why else summary, markup=False, soft_wrap=True)
    first = dict(_iterate_leaves(runs[0].config.torchtune))
    for number, run in enumerate(runs):
        differs = ", where it differs" if number else ""
        console.print(f"\n# torchtune config of {run.config.run_name}{differs}", markup=False)
        config = run.config.torchtune
        settings = {k: v for k, v in _iterate_leaves(config) if first.get(k) != v} if number else config
        console.print(OmegaConf.to_yaml(OmegaConf.create(settings)).rstrip(), markup=False, soft_wrap=True)
    for number, array in enumerate(arrays, 1):
        console.print(f"\n# array {number} of {len(arrays)}: {array.what}", markup=False, soft_wrap=True)
        console.print(array.script.rstrip(), markup=False, soft_wrap=True)
        console.print(f"# sbatch --test-only: {array.test_only}", markup=False, soft_wrap=True)


def _print_runs(runs: list[PlannedRun], console: "Console") -> None:
    from rich.table import Table

    table = Table(title=f"{len(runs)} run{'s' * (len(runs) > 1)}; nothing is started", title_justify="left")
    of_plan = ["rows", "batch", "steps/epoch", "steps", "warm-up", "tokens", "trained", "memory", "disk", "time"]
    for column in ["run", *runs[0].swept, *of_plan]:
        table.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    for run in runs:
        table.add_row(run.config.run_name, *map(str, run.swept.values()), *_format_cells(run))
    console.print(table)
    of_runs = [run.estimate for run in runs]
    console.print(summarise_estimates(of_runs), markup=False, soft_wrap=True)
    if describe_budget(runs[0].config, of_runs)["stopped"]:
        console.print("above max_gpu_hours: nothing starts without approved=true", markup=False, soft_wrap=True)
    for run in runs:
        for note in _collect_notes(run.plan):
            console.print(f"{run.config.run_name}: {note}", markup=False, soft_wrap=True)


def _iterate_leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted key and the value of every leaf of a tree."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _iterate_leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _format_cells(run: PlannedRun) -> list[str]:
    plan, steps = run.plan, run.plan.steps
    return [
        f"{plan.rows}",
        f"{plan.effective_batch}",
        f"{steps['per_epoch']}",
        f"{steps['total']}",
        f"{steps['warmup']}",
        f"{plan.tokens}",
        f"{plan.trainable_parameters} ({plan.trainable_parameters / plan.total_parameters:.2%})",
        format_size(run.estimate.memory_bytes),
        format_size(plan.disk_bytes),
        format_duration(run.estimate.seconds),
    ]


def _collect_notes(plan: RunPlan) -> list[str]:
    notes = list(plan.warnings)
    for leak, count in plan.leaks.items():
        if leak.startswith("target "):
            notes.append(f"in {count} rows of split {leak.removeprefix('target ')!r} the prompt contains the answer")
    if plan.packed_rows is not None:
        notes.append(f"{plan.packed_rows} rows in {plan.rows} packed sequences; each counts as one row")
    return notes
