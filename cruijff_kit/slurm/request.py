"""A run's request to the cluster as options of sbatch. Jobs with equal options share an array."""

from collections.abc import Sequence
from typing import Any

from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.slurm import SlurmConfig
from cruijff_kit.util.errors import UserError

_PLAIN = (
    "time", "mem", "account", "partition", "constraint", "qos", "nodelist", "exclude", "gres", "exclusive", "dependency",
    "mail_type", "mail_user", "comment", "wckey",
)  # fmt: skip
# Options of sbatch that we set, and the settings behind them.
_OURS = {
    "array": "sweep with -m; slurm.max_parallel limits how many run at once",
    "output": "logs are in .submitit; cruijff-kit logs shows them",
    "error": "logs are in .submitit; cruijff-kit logs shows them",
    "signal": "slurm.signal_delay_s",
    "open-mode": "logs are appended to",
    "job-name": "slurm.job_name",
    "gpus-per-node": "slurm.gpus",
    "cpus-per-task": "slurm.cpus",
    "ntasks": "a run is one task",
    "ntasks-per-node": "a run is one task",
    "nodes": "a run is one task on one node",
    "wrap": "slurm.setup",
    "parsable": "job ids are in sweep.json",
    "test-only": "dry_run=true",
    "wait": "slurm.wait=true",
}


def sbatch_options(config: RunConfig) -> dict[str, Any]:
    """Return a run's request under submitit's names for sbatch's options; settings that are null are left out.

    Raises:
        UserError: an additional parameter that another setting decides.
    """
    slurm = config.slurm
    options = {name: getattr(slurm, name) for name in _PLAIN if getattr(slurm, name) is not None}
    options["job_name"] = slurm.job_name or config.experiment.name
    if slurm.gpus:
        options["gpus_per_node"] = slurm.gpus
    if slurm.cpus:
        options["cpus_per_task"] = slurm.cpus
    options["signal_delay_s"] = _signal_delay(slurm)
    options["setup"], options["teardown"] = list(slurm.setup), list(slurm.teardown)
    # SLURM 22.05 to 23.02 does not hand --cpus-per-task on to srun.
    cpus = [f"--cpus-per-task={slurm.cpus}"] if slurm.cpus else []
    options["srun_args"] = [*cpus, "--open-mode=append", *slurm.srun_args]
    options["additional_parameters"] = _additional(slurm)
    return options


def _additional(slurm: SlurmConfig) -> dict[str, Any]:
    # An interrupted run goes back into the queue; some sites' default is that jobs may not.
    options: dict[str, Any] = {"requeue": True}
    for key, value in slurm.additional_parameters.items():
        name = key.replace("_", "-").lstrip("-")
        fields = {f.replace("_", "-") for f in _PLAIN}
        if name in _OURS or name in fields:
            instead = _OURS.get(name) or f"slurm.{name.replace('-', '_')}"
            raise UserError(f"slurm.additional_parameters.{key} is reserved; instead: {instead}")
        if name == "no-requeue" and value:
            del options["requeue"]
        if value is not None and value is not False:
            options[name] = value
    return options


def _signal_delay(slurm: SlurmConfig) -> int:
    limit = slurm.time_seconds
    return slurm.signal_delay_s if limit is None else max(1, min(slurm.signal_delay_s, limit // 4))


def describe(options: dict[str, Any]) -> str:
    """Describe a request for people: 2 CPUs, 1 GPU, 16G, 01:00:00, partition gpu."""
    counts = [("cpus_per_task", "CPU"), ("gpus_per_node", "GPU")]
    parts = [f"{options[key]} {unit}{'s' * (options[key] > 1)}" for key, unit in counts if key in options]
    parts += [str(options[key]) for key in ("gres", "mem", "time") if key in options]
    parts += [f"{key} {options[key]}" for key in ("partition", "account", "qos", "constraint") if key in options]
    return ", ".join(parts) or "the cluster's defaults"


def group_equal(requests: Sequence[dict[str, Any]]) -> list[tuple[dict[str, Any], list[int]]]:
    """Distinct requests in order of appearance, each with its positions in `requests`."""
    groups: list[tuple[dict[str, Any], list[int]]] = []
    for position, options in enumerate(requests):
        for group, positions in groups:
            if group == options:
                positions.append(position)
                break
        else:
            groups.append((options, [position]))
    return groups


def split(groups: list[tuple[dict[str, Any], list[int]]], most: int) -> list[tuple[dict[str, Any], list[int]]]:
    """Split groups into arrays of at most `most` jobs."""
    return [(options, positions[i : i + most]) for options, positions in groups for i in range(0, len(positions), most)]


def share_limit(sizes: list[int], max_parallel: int | None) -> list[tuple[int | None, int | None]]:
    """Divide `max_parallel` among arrays: how many jobs of each may run at once, and the array that it must wait for.

    The limit is divided by size, at least one each. More arrays than the limit allows form queues, in which each array
    waits for the one before it.

    Args:
        sizes: jobs of each array. max_parallel: None: no limit.
    """
    if max_parallel is None:
        return [(None, None)] * len(sizes)
    lanes = min(max_parallel, len(sizes))
    if lanes < len(sizes):
        base, extra = divmod(max_parallel, lanes)
        return [(base + (i % lanes < extra), i - lanes if i >= lanes else None) for i in range(len(sizes))]
    share = [max(1, max_parallel * n // sum(sizes)) for n in sizes]
    while sum(share) > max_parallel:
        share[share.index(max(share))] -= 1
    for i in sorted(range(len(sizes)), key=lambda i: share[i] - sizes[i]):  # what is left, to who can use it
        share[i] += max(0, min(sizes[i] - share[i], max_parallel - sum(share)))
    return [(n, None) for n in share]


def double_memory(mem: str | None, granted_mb: int | None) -> str | None:
    """Return twice the requested memory, or twice the granted one if none was requested; None if neither is known."""
    if mem is None:
        return f"{granted_mb * 2}M" if granted_mb else None
    digits = mem.rstrip("KMGTkmgtB")
    return f"{int(digits) * 2}{mem[len(digits) :]}"
