"""Estimate what runs will take: from similar finished runs, or by a formula if there are none.

Runs are of a kind when model, processor, processes and CPU threads agree; their seconds are scaled by tokens trained and
samples answered. Called by the launcher and the dry run; the manifest keeps each run's estimate beside which the summary
sets what it took.
"""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from cruijff_kit.config.run import RunConfig
from cruijff_kit.records.result import RunResult, read_result
from cruijff_kit.records.run_folder import find_experiment_folder, find_folders
from cruijff_kit.runs.plan import RunPlan
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.format import format_duration

_NEWEST = 200  # results that are looked at
# The formula's rates, operations per second: a GPU as LoRA at small batches uses it, a CPU thread with AVX2 or AVX-512.
_GPU_RATE, _CPU_RATES = 6e13, {"fp32": 5e10, "bf16": 2e11}
_STEP_SECONDS, _SAMPLE_SECONDS, _RUN_SECONDS, _JOB_SECONDS = 0.01, 0.004, 1.0, 20.0  # what no model's size changes


@dataclass(frozen=True)
class CostEstimate:
    """Estimated resources of a run."""

    seconds: float
    """Seconds from the start of the run to its result."""
    memory_bytes: int
    """At its peak, of a GPU or of the process."""
    gpu_hours: float
    """Hours that GPUs are held."""
    cpu_hours: float
    """Hours that CPU cores are held."""
    runs: int
    """Number of similar finished runs that it is based on."""
    basis: str
    """The same in words."""


def estimate_runs(runs: Sequence[tuple[RunConfig, RunPlan]], sweep_dir: Path) -> list[CostEstimate]:
    """Estimate each run of a sweep.

    Args:
        sweep_dir: folder of the sweep; the finished runs of all experiments beside it count.
    """
    earlier = list(_read_finished(sweep_dir, runs[0][0].experiment.name)) if runs else []
    return [_estimate_run(config, plan, [r for r in earlier if _is_similar(r, config, plan)]) for config, plan in runs]


def sum_estimates(estimates: Iterable[CostEstimate]) -> dict[str, float]:
    """seconds one after another, gpu_hours and cpu_hours of all, and the most memory that one needs."""
    estimates = list(estimates)
    sums = {name: sum(getattr(e, name) for e in estimates) for name in ("seconds", "gpu_hours", "cpu_hours")}
    return sums | {"memory_bytes": max((e.memory_bytes for e in estimates), default=0)}


def check_budget(config: RunConfig, estimates: Sequence[CostEstimate], before: float = 0.0) -> None:
    """Refuse what is estimated above `max_gpu_hours` unless a person approved it.

    Args:
        before: GPU-hours of the sweep's runs that were started already.
    Raises:
        UserError: with the estimate, and what to type.
    """
    hours = sum_estimates(estimates)["gpu_hours"] + before
    if config.max_gpu_hours is None or config.approved or hours <= config.max_gpu_hours:
        return
    raise UserError(
        f"{len(estimates)} run{'s' * (len(estimates) != 1)} would take about {hours:.3g} GPU-hours "
        f"({estimates[0].basis}), above "
        f"max_gpu_hours={config.max_gpu_hours:g}, so nothing was started; a person who agrees adds approved=true"
    )


def summarise_estimates(estimates: Sequence[CostEstimate]) -> str:
    """Describe the sweep's estimate in a line."""
    sums, bases = sum_estimates(estimates), dict.fromkeys(e.basis for e in estimates)
    hours = f"{sums['gpu_hours']:.3g} GPU-hours" if sums["gpu_hours"] else f"{sums['cpu_hours']:.3g} CPU-hours"
    return f"estimate: {format_duration(sums['seconds'])} one after another, {hours} ({'; '.join(bases)})"


def _read_finished(sweep_dir: Path, experiment: str) -> Iterable[RunResult]:
    """Read the newest finished runs of all experiments, or of this sweep alone if its folder is elsewhere."""
    folder = find_experiment_folder(sweep_dir, experiment)
    root = folder.parent if folder else sweep_dir.absolute()
    files = [run / "result.json" for run in find_folders(root, "result.json")]
    for file in sorted(files, key=lambda f: f.stat().st_mtime, reverse=True)[:_NEWEST]:
        try:
            result = read_result(file)
        except UserError:  # of an older version
            continue
        if result.status == "done" and result.training.get("tokens") and not result.resumed_at_step:
            yield result


def _is_similar(result: RunResult, config: RunConfig, plan: RunPlan) -> bool:
    device, threads = result.machine.get("device"), result.machine.get("threads")
    is_comparable = (
        device == "cpu" and threads == plan.machine["threads"] if plan.machine["device"] == "cpu" else device != "cpu"
    )
    is_comparable = is_comparable and (
        _is_dtype_unknown(config) or result.machine.get("dtype") == plan.machine["dtype"]
    )
    return is_comparable and result.model == config.model.name and result.settings.get("processes") == config.processes


def _is_dtype_unknown(config: RunConfig) -> bool:
    """Return whether the node's processor decides the dtype: dtype=auto in a job that runs elsewhere."""
    return config.slurm.submit and config.dtype == "auto"


def _estimate_run(config: RunConfig, plan: RunPlan, earlier: list[RunResult]) -> CostEstimate:
    seconds = _seconds_by_runs(earlier, config, plan) if earlier else _seconds_by_formula(config, plan)
    like = [r.training["peak_memory_bytes"] for r in earlier if r.settings["batch_size"] == config.batch_size]
    memory = max(like) if like else plan.memory_bytes
    gpus, cpus = _count_processors(config, plan)
    some = f"from {len(earlier)} finished run{'s' * (len(earlier) != 1)} of this kind"
    basis = some if earlier else "from a formula: there is no similar finished run"
    hours = seconds / 3600
    return CostEstimate(round(seconds, 1), memory, hours * gpus, hours * cpus, len(earlier), basis)


def _count_processors(config: RunConfig, plan: RunPlan) -> tuple[int, int]:
    """GPUs and CPU cores that a run holds."""
    if config.slurm.submit:
        on_gpu = plan.machine["device"] != "cpu"
        return config.slurm.gpus or (config.processes if on_gpu else 0), config.slurm.cpus or 1
    return (config.processes if plan.machine["device"] != "cpu" else 0), plan.machine["threads"]


def _count_evaluations(config: RunConfig) -> int:
    """Return how often each task is answered. Counts the base model too, whose answers may be in the cache."""
    return len(config.evaluated_epochs) + config.eval.baseline if config.eval.tasks else 0


def _seconds_by_runs(earlier: list[RunResult], config: RunConfig, plan: RunPlan) -> float:
    """Seconds, by the median of what finished runs took a token and a sample."""
    of_a_token = statistics.median(r.seconds["train"] / r.training["tokens"] for r in earlier)
    answered = [(e.seconds, e.samples) for r in earlier for e in r.evaluation if e.samples]
    of_a_sample = statistics.median(s / n for s, n in answered) if answered else _SAMPLE_SECONDS
    setup = statistics.median(r.seconds.get("setup", 0) for r in earlier)
    return of_a_token * plan.tokens + of_a_sample * sum(plan.samples.values()) * _count_evaluations(config) + setup


def _seconds_by_formula(config: RunConfig, plan: RunPlan) -> float:
    """Seconds, by counting operations: 2 a weight and token forward, 2 backward (the base is frozen), 2 to recompute."""
    gpu = plan.machine["device"] != "cpu"
    dtype = "fp32" if _is_dtype_unknown(config) else plan.machine["dtype"]
    rate = _GPU_RATE if gpu else _CPU_RATES[dtype] * plan.machine["threads"]
    rate *= config.processes if gpu else 1
    weights = plan.total_parameters
    training_seconds = (6 if config.enable_activation_checkpointing else 4) * weights * plan.tokens / rate
    evaluation_seconds = sum(
        n * (2 * weights * plan.sample_tokens[t] / rate + _SAMPLE_SECONDS) for t, n in plan.samples.items()
    )
    overhead_seconds = _JOB_SECONDS if config.slurm.submit else _RUN_SECONDS
    return (
        training_seconds
        + _STEP_SECONDS * plan.steps["total"]
        + evaluation_seconds * _count_evaluations(config)
        + overhead_seconds
    )
