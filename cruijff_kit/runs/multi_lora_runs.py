"""Packs: runs of a sweep that train together on one base model in memory (`multi_lora=auto`, `multi_lora=N`).

Which runs can share one is worked out here, without torch; how they train is recipes/lora_multi.py. Each run is told by
run.run_story, so that it writes what it would write by itself. Called by launch (sweeps made here or submitted, and their
dry run), by resume, and by the jobs of a cluster.
"""

import dataclasses
import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.summary import refresh_above
from cruijff_kit.config.run import AUTO, RunConfig
from cruijff_kit.records import failures
from cruijff_kit.records.result import RunResult
from cruijff_kit.records.run_status import FAILED, Heartbeat, forget_cancel
from cruijff_kit.runs.plan import check
from cruijff_kit.runs.run import Start, run_story
from cruijff_kit.training.coroutine import Story
from cruijff_kit.training.group_size import MOST, PackSize
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.progress import progress, say
from cruijff_kit.util.signals import Cancelled, StopSignals

if TYPE_CHECKING:
    from cruijff_kit.recipes.lora_multi import Pack

_ONE_RUN_AT_A_TIME = ("wandb", "mlflow")  # what their libraries can do in one process
_MOST_IN_A_JOB = 8  # with multi_lora=auto
_OF_THE_TIME = 0.8  # of slurm.time, that the runs of a job may take if they gain nothing from each other


@dataclass(frozen=True)
class PlannedPack:
    """Places of runs that train together, in order; at_once of them at a time, None: as many as measuring finds best.
    why: of a run that trains alone; empty in a pack.
    """

    runs: list[int]
    at_once: int | None = 1
    why: str = ""

    def in_words(self, total: int) -> str:
        """A pack among `total` runs, in a line."""
        how = f"{self.at_once} at a time" if self.at_once else "as many at a time as is fastest"
        return f"{len(self.runs)} of {total} runs train together, {how}"


def packs_of(configs: Sequence[RunConfig], seconds: Sequence[float] | None = None) -> list[PlannedPack]:
    """Which runs train together: those that share base model, device, precision and threads. Every run once, in order of
    the first of each pack. A pack made here may hold more runs than train at a time: when one has ended, the next takes its
    place. On SLURM a pack is one job.

    Args:
        seconds: that each run is expected to take, for jobs with a time limit.
    """
    found: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    for number, config in enumerate(configs):
        why = alone_because(config)
        key = f"{number}" if why else _shared(config)
        found.setdefault(key, []).append(number)
        reasons[key] = why
    packs = []
    for key, runs in found.items():
        parts = [runs] if reasons[key] or not configs[runs[0]].slurm.submit else _jobs(runs, configs, seconds)
        packs += [_planned(part, configs[part[0]], reasons[key], len(parts)) for part in parts]
    return packs


def _planned(runs: list[int], config: RunConfig, why: str, parts: int) -> PlannedPack:
    if len(runs) > 1:
        return PlannedPack(runs, None if config.multi_lora == AUTO else min(config.multi_lora, len(runs)))
    others = "no other run shares its base model and machine"
    return PlannedPack(runs, why=why or (others if parts == 1 else "it is what is left when the others are in jobs"))


def _jobs(runs: list[int], configs: Sequence[RunConfig], seconds: Sequence[float] | None) -> list[list[int]]:
    """Runs that can share a job, in jobs."""
    first = configs[runs[0]]
    if first.multi_lora != AUTO:
        return [runs[i : i + first.multi_lora] for i in range(0, len(runs), first.multi_lora)]
    limit = first.slurm.time_seconds
    jobs: list[list[int]] = []
    taken = 0.0
    for run in runs:
        needs = seconds[run] if seconds else 0.0
        over = limit is not None and taken + needs > _OF_THE_TIME * limit
        if not jobs or over or len(jobs[-1]) == _MOST_IN_A_JOB:
            jobs.append([])
            taken = 0.0
        jobs[-1].append(run)
        taken += needs
    return jobs


def alone_because(config: RunConfig) -> str:
    """Why a run cannot train in a pack; empty where it can."""
    cfg = config.torchtune
    single = next((name for name in config.trackers if name in _ONE_RUN_AT_A_TIME), "")
    on_cpus = config.slurm.submit and (config.device == "cpu" or not (config.slurm.gpus or config.slurm.gres))
    reasons = {
        "multi_lora=off": config.multi_lora == "off",
        "on a cluster's CPUs jobs side by side end sooner than a group (multi_lora=4 makes groups)": on_cpus
        and config.multi_lora == AUTO,
        f"it trains on {config.processes} processes": config.processes > 1,
        "compile=true": config.compile,
        f"{single} follows one run at a time": bool(single),
        "its activations are offloaded": config.enable_activation_offloading,
        "it is profiled": bool(cfg["profiler"]["enabled"]),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def _shared(config: RunConfig) -> str:
    """What all runs of a pack have in common."""
    cfg = config.torchtune
    base = {k: v for k, v in cfg["checkpointer"].items() if k not in ("output_dir", "recipe_checkpoint")}
    builder = {k: cfg["model"].get(k) for k in ("_component_", "checkpoint_dir", "quantize_base")}
    machine = [cfg[k] for k in ("device", "dtype", "threads", "enable_activation_checkpointing")]
    asked = dataclasses.asdict(config.slurm) if config.slurm.submit else None
    return json.dumps([base, builder, machine, config.multi_lora, asked], sort_keys=True)


@dataclass(frozen=True)
class PackedRun:
    """A run of a pack: its config, what distinguishes it in its sweep, what a line about it begins with ("[2/4] "), and
    what is done when its turn comes.
    """

    config: RunConfig
    swept: dict[str, Any]
    place: str = ""
    begins: Callable[[], object] = lambda: None


def run_pack(
    runs: Sequence[PackedRun],
    at_once: int | None,
    stop: StopSignals | None = None,
    begun: list[Heartbeat] | None = None,
) -> list[RunResult | Exception]:
    """Train runs together and evaluate each; everything is left in their folders.

    Args:
        runs: `packs_of` says which can be given together.
        at_once: most that train at the same time; None: as many as measuring finds best.
        stop: who listens for signals already; None: nobody.
        begun: gets the heartbeat of each run whose turn has come.
    Returns:
        Each run's result, or why it failed; one's failure is not another's.
    Raises:
        KeyboardInterrupt: the runs were interrupted; their states are saved.
    """
    from cruijff_kit.recipes.lora_multi import Pack

    ours = stop is None
    stop = stop or StopSignals(signal.SIGINT, signal.SIGTERM)

    def evaluate(cells: list[Any]) -> list[Any]:
        from cruijff_kit.evaluation.multi_run import evaluate_together

        with stop.interrupting():
            return evaluate_together(cells)

    size = PackSize(at_once or min(len(runs), MOST), measured=at_once is None)
    with progress(f"training {len(runs)} runs", sum(_updates(run.config) for run in runs)) as bar:
        pack = Pack(bar, size, evaluate)
        stop.install()
        try:
            ended = pack.tell([_story(run, pack, stop, begun) for run in runs])
        finally:
            if ours:
                stop.uninstall()
    for interrupted in (e for e in ended if isinstance(e, KeyboardInterrupt)):
        raise interrupted
    return ended


def _updates(config: RunConfig) -> int:
    """Steps of a run; none of one that cannot work, which its own story will say."""
    try:
        return check(config).steps["total"]
    except UserError:
        return 0


def _story(run: PackedRun, pack: "Pack", stop: StopSignals, begun: list[Heartbeat] | None) -> Story[RunResult]:
    config, folder = run.config, Path(run.config.output_dir)
    name = run.place + config.run_name
    start = Start(Heartbeat(folder), stop, shared=True)
    if begun is not None:
        begun.append(start.heartbeat)
    say(name)
    try:
        run.begins()
        result = yield from run_story(
            config, run.swept, start, lambda chosen: pack.member(chosen.torchtune), pack.as_data
        )
        say(f"{name} done: {result.outcome}")
        return result
    except Cancelled:
        say(f"{name} cancelled")
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        start.heartbeat.set(state=FAILED, reason=reason, cause=failures.cause_of(error))
        say(f"{name} failed: {one_line(error)}")
        raise
    finally:
        forget_cancel(folder)
        refresh_above(folder)
