"""The slurm group: where a run is executed and what it requests from the cluster."""

import re
from dataclasses import dataclass, field
from typing import Any

from cruijff_kit.config.checks import at_least, require

_MOST_MINUTES = 240  # a time limit that is a plain number


@dataclass
class SlurmConfig:
    """Where a run is executed and what it requests from the cluster, under sbatch's names. Null: not requested."""

    submit: bool = False
    """false: the run is local. true: it is submitted to SLURM."""
    time: str | None = None
    """Time limit in any form that sbatch takes: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS."""
    gpus: int | None = None
    """GPUs (--gpus-per-node)."""
    cpus: int | None = None
    """CPU cores (--cpus-per-task)."""
    mem: str | None = None
    """Memory, for example 16G (--mem)."""
    account: str | None = None
    """Account that is charged."""
    partition: str | None = None
    """Partition, or several separated by commas."""
    constraint: str | None = None
    """Node features, for example a100 or a100|h100."""
    qos: str | None = None
    """Quality of service."""
    nodelist: Any = None
    """Nodes to run on: a list, or text as sbatch takes it."""
    exclude: Any = None
    """Nodes to exclude: a list, or text."""
    gres: str | None = None
    """Generic resources, for example gpu:a100:1 (then leave gpus at 0)."""
    exclusive: Any = None
    """true: the whole node; or sbatch's values: user, mcs."""
    dependency: str | None = None
    """Start after other jobs, for example afterok:1234."""
    mail_type: Any = None
    """Events that send a mail: a list such as [END,FAIL], or text."""
    mail_user: str | None = None
    """Address for SLURM's mail."""
    comment: str | None = None
    """Free text kept with the job."""
    wckey: str | None = None
    """Workload characterisation key."""
    job_name: str | None = None
    """Name in the queue; null: the experiment's."""
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    """Any other option of sbatch, long name -> value (true for a flag): slurm.additional_parameters.reservation=NAME."""
    srun_args: list[str] = field(default_factory=list)
    """Arguments of srun, which starts the run inside the job."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before the run: modules, conda, variables."""
    teardown: list[str] = field(default_factory=list)
    """Shell lines after the run."""
    signal_delay_s: int = 120
    """Seconds before the time limit at which a run saves its state and is requeued; a quarter of short limits."""
    max_parallel: int | None = None
    """Maximum number of runs of a submission that run at once; null: the cluster's limit."""
    max_retries: int = 3
    """Maximum number of automatic restarts without progress; 0: none."""
    wait: bool = False
    """Wait until every run has ended, with a live table; sweepers that optimise need it."""

    def __post_init__(self) -> None:
        for name in ("nodelist", "exclude", "mail_type"):
            value = getattr(self, name)
            setattr(self, name, ",".join(map(str, value)) if isinstance(value, list) else value and str(value))
        at_least(0, slurm__gpus=self.gpus, slurm__max_retries=self.max_retries)
        at_least(1, slurm__cpus=self.cpus, slurm__max_parallel=self.max_parallel)
        at_least(10, slurm__signal_delay_s=self.signal_delay_s)
        limit = self.time_seconds
        require(
            self.time is None or limit is not None or self.time.upper() in ("UNLIMITED", "INFINITE"),
            f"slurm.time={self.time} is not a time limit; write 02:00:00 (HH:MM:SS), 1-12:00:00 (D-HH:MM:SS) or minutes",
        )
        require(limit is None or limit > 0, f"slurm.time={self.time} must be above 0")
        # An unquoted 2:00:00 in a YAML file arrives here as 7200.
        require(
            self.time is None or not self.time.isdigit() or int(self.time) <= _MOST_MINUTES,
            f"slurm.time={self.time} would be minutes; write HH:MM:SS, in a YAML file with quotes around it",
        )
        require(
            self.mem is None or re.fullmatch(r"\d+[KMGTkmgt]?[Bb]?", self.mem) is not None,
            f"slurm.mem={self.mem} is not an amount of memory; write for example slurm.mem=16G",
        )
        texts = {k: v for k, v in vars(self).items() if isinstance(v, str)} | self.additional_parameters
        for name, value in texts.items():
            require("\n" not in str(value), f"slurm.{name} holds a line break, which sbatch cannot take")

    @property
    def mem_bytes(self) -> int | None:
        """Requested memory in bytes; without a unit, the setting is in MB, as for sbatch."""
        if self.mem is None:
            return None
        digits = self.mem.upper().rstrip("BKMGT")
        unit = self.mem.upper().removesuffix("B")[len(digits) :] or "M"
        return int(digits) << 10 * (1 + "KMGT".index(unit))

    @property
    def time_seconds(self) -> int | None:
        """The time limit in seconds; None if there is none, or if it is unlimited."""
        match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", self.time or "")
        if match is None:
            return None
        days, *parts = (int(p) if p is not None else None for p in match.groups())
        a, b, c = (p if p is not None else 0 for p in parts)
        if days is not None:  # D-HH, D-HH:MM, D-HH:MM:SS
            return days * 86400 + a * 3600 + b * 60 + c
        num_parts = sum(p is not None for p in parts)
        return {1: a * 60, 2: a * 60 + b, 3: a * 3600 + b * 60 + c}[num_parts]
