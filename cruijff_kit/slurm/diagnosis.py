"""Diagnose a cluster for our runs, in lines that name the options to use."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

from cruijff_kit.slurm.probe_job import NodeReport
from cruijff_kit.slurm.site import Account, Partition, Site

OK, WARNING, PROBLEM = "ok", "warning", "problem"
_Lines = Iterator[tuple[str, str]]


@dataclass
class Finding:
    """A line of the report."""

    level: str
    """ok, warning or problem."""
    text: str


@dataclass
class Choice:
    """Destination of the runs: from the options, else a suitable one."""

    options: argparse.Namespace
    """Options of the command."""
    partition: Partition | None
    account: str | None
    association: Account | None
    """The account in this partition, as accounting has it."""
    qos: str | None
    limits: list[tuple[str, str, str]]
    """(name, value, whose) of every limit that is set."""


def pick_partition(site: Site, options: argparse.Namespace) -> Choice:
    """Pick the partition that is named, else the first with GPUs (the default one if it has some), else the default."""
    account = options.account or site.default_account
    usable = [p for p in site.partitions if p.state == "up" and not p.refuses(account)]
    usable.sort(key=lambda p: (not p.gpus, not p.default))
    partition = site.partition((options.partition or "").partition(",")[0]) or next(iter(usable), None)
    name = partition and partition.name
    associations = [a for a in site.accounts if a.name == account and a.partition in (name, None)]
    association = min(associations, key=lambda a: a.partition is None, default=None)
    qos = options.qos or (association.default_qos if association else None)
    limits = []
    if "limits" in site.enforced:
        own = [(f"account {account}", association.limits)] if association else []
        names = dict.fromkeys((qos, partition.qos if partition else None))
        own += [(f"qos {name}", site.qos.get(name or "", {})) for name in names]
        limits = [(name, value, whose) for whose, values in own for name, value in values.items()]
    return Choice(options, partition, account, association, qos, limits)


def diagnose(site: Site, choice: Choice) -> list[Finding]:
    """Return what matters for our runs, in the order of the report."""
    parts = (
        _check_partition,
        _check_gpus,
        _check_accounting,
        _check_account,
        _check_limits,
        _check_preemption,
        _check_folder,
        _check_node,
    )
    return [Finding(*line) for part in parts for line in part(site, choice)]


def _check_partition(site: Site, choice: Choice) -> _Lines:
    names = ", ".join(p.name for p in site.partitions)
    for name in (choice.options.partition or "").split(","):
        partition = site.partition(name)
        if name and partition is None:
            yield PROBLEM, f"there is no partition {name}; there are {names}"
        elif partition and (why := partition.refuses(choice.account)):
            yield PROBLEM, f"partition {name} {why}; there are {names}"
    p = choice.partition
    if p is None:
        yield PROBLEM, "no partition takes your jobs: ask the cluster's administrators"
    elif p.state != "up":
        yield PROBLEM, f"partition {p.name} is {p.state}: choose another, --partition P"
    elif not p.nodes_up:
        yield PROBLEM, f"none of the {p.nodes} nodes of partition {p.name} is up: choose another, --partition P"
    else:
        yield OK, f"partition {p.name}: {p.nodes_up} of {p.nodes} nodes up, {p.nodes_idle} idle"


def _check_gpus(site: Site, choice: Choice) -> _Lines:
    p, level = choice.partition, PROBLEM if choice.options.gpus else WARNING
    names = [x.name for x in site.partitions if x.gpus]
    default = next((x for x in site.partitions if x.default), None)
    if not names:
        yield level, "no GPU in any partition: slurm.gpus must be 0"
    elif p and p.gpus:
        if default and not default.gpus and not choice.options.partition:
            yield WARNING, f"the default partition {default.name} has no GPU: slurm.partition={p.name}"
        yield OK, f"GPUs in {p.name}: {gpu_text(p)}"
    elif p:
        yield level, f"partition {p.name} has no GPU; {', '.join(names)} have: slurm.partition=P"


def gpu_text(p: Partition) -> str:
    """Describe a partition's GPUs: 8 a100, 4 v100."""
    return ", ".join(f"{n} {kind}".rstrip() for kind, n in p.gpus.items())


def _check_accounting(site: Site, choice: Choice) -> _Lines:
    if not site.accounting:
        yield WARNING, f"no accounting ({site.accounting_error}): SLURM soon forgets how a job ended (MinJobAge)"
    elif site.accounting_error:
        yield WARNING, f"sacctmgr does not say what you may use: {site.accounting_error}"
    else:
        yield OK, "accounting: SLURM remembers how jobs ended"


def _check_account(site: Site, choice: Choice) -> _Lines:
    if site.accounting_error:
        return
    accounts = list(dict.fromkeys(a.name for a in site.accounts))
    if "associations" in site.enforced and choice.account not in accounts:
        have = ", ".join(accounts) or "none; ask the cluster's administrators"
        yield PROBLEM, f"{site.user} may not charge {choice.account or 'any account'}; accounts: {have}"
    elif len(accounts) > 1 and not choice.options.account:
        other_accounts = ", ".join(a for a in accounts if a != choice.account)
        yield OK, f"jobs are charged to {choice.account}; others ({other_accounts}): slurm.account=A"
    allowed = choice.association.qos if choice.association else []
    if "qos" in site.enforced and allowed and choice.options.qos not in (None, *allowed):
        yield PROBLEM, f"{choice.account} may not use qos {choice.options.qos}; it may use {', '.join(allowed)}"


def _check_limits(site: Site, choice: Choice) -> _Lines:
    for name, value, whose in choice.limits:
        from_ = f"({name} of {whose})"
        if "Submit" in name:
            rest = "larger sweeps are submitted in parts; cruijff-kit resume DIR queues the rest"
            yield WARNING, f"{value} jobs in the queue at once {from_}: {rest}"
        elif "Jobs" in name:
            yield WARNING, f"{value} jobs run at once {from_}; the others wait"
        elif name == "MaxWall":
            yield WARNING, f'at most {value} for a job {from_}: slurm.time="{value}"'
        else:
            yield WARNING, f"{name}={value} {from_}: jobs that ask for more wait"
    yield OK, f"MaxArraySize={site.max_array_size}: sweeps of more runs are submitted in parts"


def _check_preemption(site: Site, choice: Choice) -> _Lines:
    p, grace = choice.partition, None
    if site.preempt_type == "preempt/qos":
        grace = site.preempted_qos.get(choice.qos or "")
    elif site.preempt_type == "preempt/partition_prio" and p and p.preempt_mode != "OFF":
        grace = p.grace_s if any(x.priority > p.priority for x in site.partitions) else None
    if grace:
        yield OK, f"jobs may be preempted; they get GraceTime={grace} s to save their state and are requeued"
    elif grace == 0:
        yield WARNING, "jobs may be preempted at once (GraceTime=0): save on the way, checkpoint_every_n_steps=50"


def _check_folder(site: Site, choice: Choice) -> _Lines:
    folder = site.folder
    if not folder.writable:
        yield PROBLEM, f"{folder.path} cannot be written: name another folder, hydra.sweep.dir=DIR"
    elif not folder.locks:
        yield PROBLEM, f"{folder.path} is on a file system without file locks ({folder.file_system}): choose another"
    elif folder.shared:
        yield OK, f"{folder.path} is on a file system that machines share ({folder.file_system})"
    elif site.node is None:
        only = f"perhaps only this machine's ({folder.file_system}, see with --job)"
        yield WARNING, f"{folder.path} is on a file system that is {only}"


def _check_node(site: Site, choice: Choice) -> _Lines:
    node = site.node
    if node and node.error:
        yield PROBLEM, node.error
    if node and node.python:  # it ran
        yield OK, f"{node.hostname} sees {site.folder.path} and {node.python}"
        yield from _check_node_details(node, choice.options.gpus)


def _check_node_details(node: NodeReport, gpus: int) -> _Lines:
    if node.package:
        level, package = (OK, "cruijff_kit") if node.same_package else (PROBLEM, "another cruijff_kit,")
        yield level, f"{node.hostname} imports {package} from {node.package}"
    if node.cache_shared:
        yield OK, f"{node.hostname} shares the cache"
    else:
        fix = "export CRUIJFF_CACHE=DIR, where all nodes see and write it"
        yield WARNING, f"{node.hostname} does not share the cache: {fix}"
    if gpus:
        enough = (node.torch_gpus or 0) >= gpus
        fix = (
            "" if enough else ": does nvidia-smi work there? then install PyTorch's build for its driver (pytorch.org)"
        )
        text = f"PyTorch reaches {node.torch_gpus} of {gpus} GPUs on {node.hostname}{fix}"
        yield OK if enough else PROBLEM, text
