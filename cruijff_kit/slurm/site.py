"""The facts about a cluster and about the folder where runs will be written; `slurm/diagnosis.py` judges them.

All queries use SLURM's parsable formats, which have been the same since 20.11.
"""

import fcntl
import os
import pwd
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from cruijff_kit.slurm import client
from cruijff_kit.slurm.probe_job import NodeReport
from cruijff_kit.util.errors import ClusterError

# File systems that other machines can see too.
_SHARED = (
    "nfs", "lustre", "gpfs", "beegfs", "ceph", "afs", "cifs", "smb", "panfs", "wekafs", "pvfs2", "orangefs", "gfs2",
)  # fmt: skip
_ASSOCIATION = ("MaxJobs", "MaxSubmit", "MaxWall", "MaxTRES", "GrpJobs", "GrpSubmit", "GrpTRES")
_QOS = (
    "MaxWall", "MaxTRES", "MaxTRESPU", "MaxJobsPU", "MaxJobsPA", "MaxSubmitPU", "MaxSubmitPA", "GrpJobs", "GrpSubmit",
    "GrpTRES",
)  # fmt: skip


@dataclass
class Partition:
    """A partition; its nodes may differ."""

    name: str
    """Name of the partition."""
    default: bool
    """Whether jobs without a partition run in it."""
    state: str
    """SLURM's word: up, down, drain or inact."""
    max_time: str
    """Longest time limit in SLURM's format (1-00:00:00, infinite)."""
    nodes: int = 0
    """Number of nodes."""
    nodes_up: int = 0
    """Number of nodes that are allocated or idle."""
    nodes_idle: int = 0
    """Number of idle nodes."""
    cpus: list[int] = field(default_factory=list)
    """The numbers that its nodes have."""
    memory_mb: list[int] = field(default_factory=list)
    """The sizes that its nodes have."""
    gpus: dict[str, int] = field(default_factory=dict)
    """Type ("" where it has no name) -> number."""
    features: list[str] = field(default_factory=list)
    """Features of its nodes, for --constraint."""
    preempt_mode: str | None = None
    """Treatment of its preempted jobs (PreemptMode): OFF, REQUEUE, CANCEL, ..."""
    priority: int = 0
    """PriorityTier; with preempt/partition_prio, jobs of a higher tier preempt those of a lower one."""
    grace_s: int = 0
    """Seconds between the signal to a preempted job and its end (GraceTime)."""
    qos: str | None = None
    """The qos whose limits its jobs have too."""
    allow_accounts: list[str] | None = None
    """None: all."""
    deny_accounts: list[str] = field(default_factory=list)
    """Accounts whose jobs it refuses."""

    def refuses(self, account: str | None) -> str | None:
        """Return why jobs of this account may not run here; None if they may."""
        if account and self.allow_accounts is not None and account not in self.allow_accounts:
            return f"is for the accounts {', '.join(self.allow_accounts)}"
        return f"is not for the account {account}" if account in self.deny_accounts else None


@dataclass
class Account:
    """An account that the user may charge."""

    name: str
    partition: str | None
    qos: list[str]
    default_qos: str | None
    limits: dict[str, str]
    """Limits that are set for the user or the whole account, by sacctmgr's names."""


@dataclass
class Folder:
    """A folder as this machine sees it."""

    path: str
    """Absolute path."""
    file_system: str
    """Type of the file system, as `df` names it."""
    shared: bool
    """Whether its file system is of a kind that other machines see."""
    writable: bool
    """Whether this process can create files in it."""
    locks: bool
    """Whether flock works in it."""


@dataclass
class Site:
    """A cluster as one user sees it."""

    name: str
    """ClusterName."""
    version: str
    """SLURM's version."""
    user: str
    """Login name of the user."""
    max_array_size: int
    """MaxArraySize: limit on the number of jobs in one array; 0 if SLURM does not give it."""
    preempt_type: str
    """PreemptType: preempt/none, preempt/qos or preempt/partition_prio."""
    accounting: bool
    """Whether sacct answers."""
    accounting_error: str | None
    """The error of sacct, or else of sacctmgr."""
    enforced: list[str]
    """AccountingStorageEnforce: the limits that SLURM enforces (associations, limits, qos, ...)."""
    partitions: list[Partition]
    """Partitions that the user sees."""
    folder: Folder
    """Folder of the runs."""
    default_account: str | None = None
    """Account of jobs that name none; None if there is none."""
    accounts: list[Account] = field(default_factory=list)
    """Accounts that the user may charge."""
    qos: dict[str, dict[str, str]] = field(default_factory=dict)
    """Limits of each qos that matters here, by sacctmgr's names."""
    preempted_qos: dict[str, int] = field(default_factory=dict)
    """qos whose jobs others may preempt -> seconds of grace."""
    node: NodeReport | None = None
    """Report of the probe job; None without one."""

    def partition(self, name: str | None) -> Partition | None:
        """The partition of that name."""
        return next((p for p in self.partitions if p.name == name), None)


def read_site(folder: Path) -> Site:
    """Query SLURM about itself and about this user.

    Raises:
        ClusterError: there is no SLURM here, or it does not answer.
    """
    config = client.config()
    site = Site(
        name=config["ClusterName"],
        version=config["SLURM_VERSION"],
        user=pwd.getpwuid(os.getuid()).pw_name,
        max_array_size=_number(config.get("MaxArraySize")),
        preempt_type=config.get("PreemptType", "preempt/none"),
        accounting=False,
        accounting_error=None,
        enforced=config.get("AccountingStorageEnforce", "none").split(","),
        partitions=_partitions(),
        folder=inspect_folder(folder),
    )
    try:
        client.call("sacct", "-n", "-X", "-P", "-o", "JobID", "-S", "now")
        site.accounting = True
        _read_accounts(site)
    except ClusterError as error:  # sacctmgr may be closed to users
        site.accounting_error = str(error)
    return site


def _number(text: str | None) -> int:
    """Return the number that a value such as `300 sec` begins with; 0 if there is none."""
    word = (text or "").partition(" ")[0]
    return int(word) if word.isdigit() else 0


def _partitions() -> list[Partition]:
    """Return the partitions that this user sees; SLURM hides those of other groups."""
    partitions: dict[str, Partition] = {}
    for line in client.call("sinfo", "--noheader", "--exact", "--format=%P|%a|%l|%F|%c|%m|%G|%f").splitlines():
        name, state, max_time, nodes, cpus, memory, gres, features = line.split("|")
        allocated, idle, _, total = map(int, nodes.split("/"))
        p = partitions.setdefault(name.rstrip("*"), Partition(name.rstrip("*"), name.endswith("*"), state, max_time))
        p.nodes, p.nodes_up, p.nodes_idle = p.nodes + total, p.nodes_up + allocated + idle, p.nodes_idle + idle
        if total:
            p.cpus, p.memory_mb = sorted({*p.cpus, int(cpus)}), sorted({*p.memory_mb, int(memory)})
        for kind, number in parse_gpus(gres).items():
            p.gpus[kind] = p.gpus.get(kind, 0) + total * number
        p.features = list(dict.fromkeys([*p.features, *_names(features)]))
    for fields in map(client.key_values, client.call("scontrol", "--oneliner", "show", "partition").splitlines()):
        if p := partitions.get(fields.get("PartitionName", "")):
            p.preempt_mode, p.qos = fields.get("PreemptMode"), next(iter(_names(fields.get("QoS"))), None)
            p.priority, p.grace_s = _number(fields.get("PriorityTier")), _number(fields.get("GraceTime"))
            p.allow_accounts = _names(fields.get("AllowAccounts")) or None
            p.deny_accounts = _names(fields.get("DenyAccounts"))
    return list(partitions.values())


def _names(text: str | None) -> list[str]:
    return [] if text in (None, "", "(null)", "N/A", "NONE", "ALL") else text.split(",")


def parse_gpus(gres: str) -> dict[str, int]:
    """Parse SLURM's `gpu:a100:4(S:0-1),shard:8`: type ("" where it has none) -> number of GPUs on a node."""
    gpus: dict[str, int] = {}
    # A type holds something other than digits: gpu:4, gpu:a100:4, gpu:1g.5gb:4
    for kind, number in re.findall(r"(?:^|,)gpu\b(?::([^:,(]*[^\d:,(][^:,(]*))?(?::(\d+))?", gres):
        gpus[kind] = gpus.get(kind, 0) + int(number or 1)
    return gpus


def _read_accounts(site: Site) -> None:
    cluster = f"cluster={site.name}"
    mine = _query(
        "assoc", f"user={site.user}", cluster, fields=("Account", "Partition", "QOS", "DefaultQOS", *_ASSOCIATION)
    )
    names = ",".join(sorted({row["Account"] for row in mine}))
    rows = (
        _query("assoc", f"account={names}", "user=", cluster, fields=("Account", "User", *_ASSOCIATION))
        if names
        else []
    )
    of_all = {row["Account"]: _limits(row, _ASSOCIATION) for row in rows if not row["User"]}
    for row in mine:
        allowed = [q for q in row["QOS"].split(",") if q]
        usual = row["DefaultQOS"] or (allowed[0] if len(allowed) == 1 else "normal" if "normal" in allowed else None)
        limits = of_all.get(row["Account"], {}) | _limits(row, _ASSOCIATION)
        site.accounts.append(Account(row["Account"], row["Partition"] or None, allowed, usual, limits))
    users = _query("user", site.user, fields=("DefaultAccount",))
    site.default_account = users[0]["DefaultAccount"] or None if users else None
    relevant = {q for a in site.accounts for q in a.qos} | {p.qos for p in site.partitions}
    rows = _query("qos", fields=("Name", "Preempt", "GraceTime", *_QOS))
    site.qos = {row["Name"]: _limits(row, _QOS) for row in rows if row["Name"] in relevant}
    preempted = {name for row in rows for name in row["Preempt"].split(",") if name in relevant}
    grace = {row["Name"]: client.seconds(row["GraceTime"]) or 0 for row in rows}
    site.preempted_qos = {name: grace[name] for name in preempted}


def _query(*what: str, fields: tuple[str, ...]) -> list[dict[str, str]]:
    text = client.call("sacctmgr", "-nP", "show", *what, f"format={','.join(fields)}")
    return [dict(zip(fields, line.split("|"), strict=True)) for line in text.splitlines()]


def _limits(row: dict[str, str], names: tuple[str, ...]) -> dict[str, str]:
    return {name: row[name] for name in names if row[name]}


def inspect_folder(folder: Path) -> Folder:
    """Inspect a folder without a job."""
    words = subprocess.run(["df", "--output=fstype", folder.absolute()], capture_output=True, text=True).stdout.split()
    kind = words[-1] if words else "unknown"
    writable = locks = False
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            writable = True
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            locks = True
    except OSError:
        pass
    return Folder(str(folder.absolute()), kind, kind.startswith(_SHARED), writable, locks)
