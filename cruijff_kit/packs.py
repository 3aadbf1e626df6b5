"""Packs: runs of a sweep that train together on one base model in memory (`pack=N`).

Which runs can share one is worked out here, without torch; how they train is recipes/lora_packed.py. Each run is told by
run.run_story, so that it writes what it would write by itself. Called by launch (sweeps made here, and their dry run) and
by resume.
"""

import json
import signal
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cruijff_kit.config import RunConfig
from cruijff_kit.errors import UserError, one_line
from cruijff_kit.plan import check
from cruijff_kit.progress import progress, say
from cruijff_kit.result import RunResult
from cruijff_kit.run import Start, run_story
from cruijff_kit.run_status import Heartbeat
from cruijff_kit.stopping import StopSignals
from cruijff_kit.summary import refresh_above
from cruijff_kit.training.passes import Story

if TYPE_CHECKING:
    from cruijff_kit.recipes.lora_packed import Pack

_ONE_RUN_AT_A_TIME = ("wandb", "mlflow")  # what their libraries can do in one process


@dataclass(frozen=True)
class PlannedPack:
    """Places of runs that train together, in order; at_once of them at a time. why: of a run that trains alone; empty in a
    pack.
    """

    runs: list[int]
    at_once: int = 1
    why: str = ""

    def in_words(self, total: int) -> str:
        """A pack among `total` runs, in a line."""
        return f"{len(self.runs)} of {total} runs train together, {self.at_once} at a time"


def packs_of(configs: list[RunConfig]) -> list[PlannedPack]:
    """Which runs train together: those that share base model, device, precision and threads. Every run once, in order of
    the first of each pack; a pack may hold more runs than train at a time: when one has ended, the next takes its place.
    """
    found: dict[str, list[int]] = {}
    reasons: dict[str, str] = {}
    for number, config in enumerate(configs):
        why = alone_because(config)
        key = f"{number}" if why else _shared(config)
        found.setdefault(key, []).append(number)
        reasons[key] = why
    return [
        PlannedPack(runs, min(configs[runs[0]].pack, len(runs)))
        if len(runs) > 1
        else PlannedPack(runs, why=reasons[key] or "no other run shares its base model and machine")
        for key, runs in found.items()
    ]


def alone_because(config: RunConfig) -> str:
    """Why a run cannot train in a pack; empty where it can."""
    cfg = config.torchtune
    dropout = cfg["model"].get("lora_dropout", 0.0) > 0
    single = next((name for name in config.trackers if name in _ONE_RUN_AT_A_TIME), "")
    reasons = {
        "pack=off": config.pack == "off",
        "it is submitted to SLURM": config.slurm.submit,
        f"it trains on {config.processes} processes": config.processes > 1,
        "its base model is in 4 bits": bool(cfg["model"].get("quantize_base")),
        "compile=true": config.compile,
        f"{single} follows one run at a time": bool(single),
        "its activations are offloaded": config.enable_activation_offloading,
        "dropout with activation checkpointing": dropout and config.enable_activation_checkpointing,
        "it is profiled": bool(cfg["profiler"]["enabled"]),
    }
    return next((why for why, holds in reasons.items() if holds), "")


def _shared(config: RunConfig) -> str:
    """What all runs of a pack have in common."""
    cfg = config.torchtune
    base = {k: v for k, v in cfg["checkpointer"].items() if k not in ("output_dir", "recipe_checkpoint")}
    builder = {k: cfg["model"].get(k) for k in ("_component_", "checkpoint_dir")}
    machine = [cfg[k] for k in ("device", "dtype", "threads", "enable_activation_checkpointing")]
    return json.dumps([base, builder, machine, config.pack], sort_keys=True)


def run_pack(runs: list[tuple[RunConfig, dict[str, Any]]], at_once: int) -> list[RunResult | Exception]:
    """Train runs together and evaluate each; everything is left in their folders.

    Args:
        runs: config and swept values of each; `packs_of` says which can be given together.
        at_once: most that train at the same time.
    Returns:
        Each run's result, or why it failed; one's failure is not another's.
    Raises:
        KeyboardInterrupt: the runs were interrupted; their states are saved.
    """
    from cruijff_kit.recipes.lora_packed import Pack

    stop = StopSignals(signal.SIGINT, signal.SIGTERM)
    about = {"id": uuid.uuid4().hex[:8], "size": at_once}
    with progress(f"training {len(runs)} runs", sum(_updates(config) for config, _ in runs)) as bar:
        pack = Pack(bar)
        stop.listen()
        try:
            ended = pack.tell([_story(config, swept, pack, stop, about) for config, swept in runs], at_once)
        finally:
            stop.let_go()
    for interrupted in (e for e in ended if isinstance(e, KeyboardInterrupt)):
        raise interrupted
    return ended


def _updates(config: RunConfig) -> int:
    """Steps of a run; none of one that cannot work, which its own story will say."""
    try:
        return check(config).steps["total"]
    except UserError:
        return 0


def _story(config: RunConfig, swept: dict[str, Any], pack: "Pack", stop: StopSignals, about: dict) -> Story[RunResult]:
    start = Start(Heartbeat(config.output_dir), stop, shared=True)
    say(f"{config.run_name} begins")
    try:
        result = yield from run_story(config, swept, start, lambda chosen: pack.member(chosen.torchtune), about)
        say(f"{config.run_name} done: {result.objective_name} {result.objective:.4g}")
        return result
    except Exception as error:
        say(f"{config.run_name} failed: {one_line(error)}")
        raise
    finally:
        refresh_above(start.heartbeat.run)
