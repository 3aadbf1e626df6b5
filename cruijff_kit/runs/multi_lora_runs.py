"""Groups: runs of a sweep that train together on one base model in memory (`multi_lora=auto`, `multi_lora=N`).

Which runs can share one is decided here, without torch; how they train is recipes/lora_multi.py. Each run is a whole
`train_then_eval`, so that it writes what it would write by itself.
"""

import dataclasses
import functools
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.summary import refresh_sweep_summary
from cruijff_kit.config.run import AUTO, RunConfig
from cruijff_kit.records import failures
from cruijff_kit.records.result import RunResult
from cruijff_kit.records.run_status import Heartbeat, RunState, clear_cancel_request
from cruijff_kit.runs.plan import plan_run
from cruijff_kit.runs.run import RunContext, train_then_eval
from cruijff_kit.training.group_size import MAX_SIZE, GroupSizeTuner
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.progress import progress, say
from cruijff_kit.util.signals import Cancelled, StopSignals

if TYPE_CHECKING:
    from cruijff_kit.recipes.lora_multi import Slot

_ONE_RUN_AT_A_TIME = ("wandb", "mlflow")  # what their libraries can do in one process
_MAX_RUNS_PER_JOB = 8  # with multi_lora=auto
_TIME_SHARE = 0.8  # of slurm.time, that the runs of a job may take if they gain nothing from each other


@dataclass(frozen=True)
class PlannedGroup:
    """Runs that train together, or one that trains alone."""

    runs: list[int]
    """Their places among all runs, in order."""
    at_once: int | None = 1
    """Number of runs that train at a time; None: the measured optimum."""
    why: str = ""
    """Why a run trains alone; empty in a group."""

    def summary(self, total: int) -> str:
        """Say in a line which part of `total` runs this is."""
        how = f"{self.at_once} at a time" if self.at_once else "as many at a time as is fastest"
        return f"{len(self.runs)} of {total} runs train together, {how}"


def plan_groups(configs: Sequence[RunConfig], seconds: Sequence[float] | None = None) -> list[PlannedGroup]:
    """Decide which runs train together: those that share base model, device, precision and threads.

    A group on this machine may hold more runs than train at a time: when one has ended, the next takes its place. On SLURM
    a group is one job.

    Args:
        seconds: that each run is expected to take, for jobs with a time limit.
    Returns:
        Every run once, in order of the first of each group.
    """
    groups: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    for number, config in enumerate(configs):
        why = reason_not_grouped(config)
        key = f"{number}" if why else _group_key(config)
        groups.setdefault(key, []).append(number)
        reasons[key] = why
    planned = []
    for key, runs in groups.items():
        is_split = not reasons[key] and configs[runs[0]].slurm.submit
        parts = _split_into_jobs(runs, configs, seconds) if is_split else [runs]
        planned += [_plan_group(part, configs[part[0]], reasons[key], len(parts)) for part in parts]
    return planned


def _plan_group(runs: list[int], config: RunConfig, why: str, parts: int) -> PlannedGroup:
    if len(runs) > 1:
        return PlannedGroup(runs, None if config.multi_lora == AUTO else min(config.multi_lora, len(runs)))
    default_reason = "no other run shares its base model and machine"
    return PlannedGroup(runs, why=why or (default_reason if parts == 1 else "the other runs fill their jobs"))


def _split_into_jobs(runs: list[int], configs: Sequence[RunConfig], seconds: Sequence[float] | None) -> list[list[int]]:
    """Split runs that can share a job by the number and the time of a job's runs."""
    first = configs[runs[0]]
    if first.multi_lora != AUTO:
        return [runs[i : i + first.multi_lora] for i in range(0, len(runs), first.multi_lora)]
    limit = first.slurm.time_seconds
    jobs: list[list[int]] = []
    job_seconds = 0.0
    for run in runs:
        own = seconds[run] if seconds else 0.0
        is_over = limit is not None and job_seconds + own > _TIME_SHARE * limit
        if not jobs or is_over or len(jobs[-1]) == _MAX_RUNS_PER_JOB:
            jobs.append([])
            job_seconds = 0.0
        jobs[-1].append(run)
        job_seconds += own
    return jobs


def reason_not_grouped(config: RunConfig) -> str:
    """Say why a run cannot train in a group; empty where it can."""
    cfg = config.torchtune
    single = next((name for name in config.trackers if name in _ONE_RUN_AT_A_TIME), "")
    on_cpus = config.slurm.submit and (config.device == "cpu" or not (config.slurm.gpus or config.slurm.gres))
    reasons = {
        "multi_lora=off": config.multi_lora == "off",
        "on a cluster's CPUs parallel jobs finish sooner than a group (multi_lora=4 makes groups)": on_cpus
        and config.multi_lora == AUTO,
        f"it trains on {config.processes} processes": config.processes > 1,
        "compile=true": config.compile,
        f"{single} follows one run at a time": bool(single),
        "its activations are offloaded": config.enable_activation_offloading,
        "it is profiled": bool(cfg["profiler"]["enabled"]),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def _group_key(config: RunConfig) -> str:
    """Return the settings that all runs of a group share, as JSON."""
    cfg = config.torchtune
    base = {k: v for k, v in cfg["checkpointer"].items() if k not in ("output_dir", "recipe_checkpoint")}
    builder = {k: cfg["model"].get(k) for k in ("_component_", "checkpoint_dir", "quantize_base")}
    machine = [cfg[k] for k in ("device", "dtype", "threads", "enable_activation_checkpointing")]
    job = dataclasses.asdict(config.slurm) if config.slurm.submit else None
    return json.dumps([base, builder, machine, config.multi_lora, job], sort_keys=True)


@dataclass(frozen=True)
class GroupRun:
    """A run of a group."""

    config: RunConfig
    """Config of the run."""
    swept: dict[str, Any]
    """Values that distinguish it in its sweep."""
    prefix: str = ""
    """Prefix of messages about it: "[2/4] "."""
    on_start: Callable[[], object] = lambda: None
    """Called when it starts; an exception ends the run."""


def run_group(
    runs: Sequence[GroupRun],
    at_once: int | None,
    stop: StopSignals | None = None,
    started: list[Heartbeat] | None = None,
) -> list[RunResult | Exception]:
    """Train runs together and evaluate each; everything is left in their folders.

    Args:
        runs: `plan_groups` says which can be given together.
        at_once: most that train at the same time; None: as many as measuring finds best.
        stop: existing handler of signals; None: there is none.
        started: gets the heartbeat of each run whose turn has come.
    Returns:
        Each run's result, or why it failed; one's failure is not another's.
    Raises:
        KeyboardInterrupt: the runs were interrupted; their checkpoints are saved.
    """
    from cruijff_kit.recipes.lora_multi import MultiLoraTrainer

    is_ours = stop is None
    stop = stop or StopSignals(signal.SIGINT, signal.SIGTERM)

    def evaluate(items: list[Any]) -> list[Any]:
        from cruijff_kit.evaluation.multi_run import evaluate_together

        with stop.interrupting():
            return evaluate_together(items)

    tuner = GroupSizeTuner(at_once or min(len(runs), MAX_SIZE), measured=at_once is None)
    with progress(f"training {len(runs)} runs", sum(_count_steps(run.config) for run in runs)) as bar:
        trainer = MultiLoraTrainer(bar, tuner, evaluate)
        stop.install()
        try:
            results = trainer.run([functools.partial(_run_member, run, stop, started) for run in runs])
        finally:
            if is_ours:
                stop.uninstall()
    for interrupt in (r for r in results if isinstance(r, KeyboardInterrupt)):
        raise interrupt
    return results


def _count_steps(config: RunConfig) -> int:
    """Return the steps of a run; 0 for an invalid one, for which `train_then_eval` raises the error."""
    try:
        return plan_run(config).steps["total"]
    except UserError:
        return 0


def _run_member(run: GroupRun, stop: StopSignals, started: list[Heartbeat] | None, slot: "Slot") -> RunResult:
    """Train and evaluate one run of a group, in its slot."""
    folder, name = Path(run.config.output_dir), run.prefix + run.config.run_name
    heartbeat = Heartbeat(folder)
    if started is not None:
        started.append(heartbeat)
    say(name)
    try:
        run.on_start()
        result = train_then_eval(run.config, run.swept, RunContext(heartbeat, stop, slot))
        say(f"{name} done: {result.outcome}")
        return result
    except Cancelled:
        say(f"{name} cancelled")
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        heartbeat.set(state=RunState.FAILED, reason=reason, cause=failures.find_cause(error))
        say(f"{name} failed: {one_line(error)}")
        raise
    finally:
        clear_cancel_request(folder)
        refresh_sweep_summary(folder)
