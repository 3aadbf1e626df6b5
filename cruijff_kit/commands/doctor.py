"""Diagnose a SLURM cluster: `cruijff-kit doctor [--job] [DIR] [--json]`.

Queries SLURM, prints what matters for our runs and what to type, and a slurm YAML to start from. --json:
slurm.site.Site, "findings" and "yaml"; exit code 1 when a finding is a problem.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict
from pathlib import Path

from cruijff_kit.commands.base import CommandResult, ExitCode, Parser
from cruijff_kit.slurm import client
from cruijff_kit.slurm.diagnosis import OK, PROBLEM, WARNING, Choice, Finding, diagnose, gpu_text, pick_partition
from cruijff_kit.slurm.probe_job import run_probe_job
from cruijff_kit.slurm.site import Account, Partition, Site, read_site
from cruijff_kit.util.errors import UserError

_SHORT_S = 3600  # what the smallest model asks for
_COLOURS = {OK: "green", WARNING: "yellow", PROBLEM: "red"}
_SBATCH_OPTIONS = ("account", "partition", "qos", "constraint")


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code: 0, 1 if something will not work, 3 without SLURM."""
    parser = Parser("doctor", "Check this cluster.", "the findings and the YAML, as one JSON document")
    add = parser.add_argument
    add("folder", metavar="DIR", nargs="?", type=Path, default=".", help="where runs will be written; default: here")
    add("--job", action="store_true", help="also submit a tiny job that probes a node")
    add("--gpus", type=int, default=0, metavar="N", help="GPUs that the job requests")
    add("--wait", type=int, default=300, metavar="SECONDS", help="the longest wait for the job (300)")
    for name in _SBATCH_OPTIONS:
        add(f"--{name}", metavar=name[0].upper(), help="for the job and the YAML, as sbatch takes it")
    return parser.run(argv, _examine)


def _examine(options: argparse.Namespace) -> CommandResult:
    if options.gpus and not options.job:
        raise UserError("--gpus needs --job")
    if not options.folder.is_dir():
        raise UserError(f"no such folder: {options.folder}; mkdir -p {options.folder}")
    site = read_site(options.folder)
    choice = pick_partition(site, options)
    if options.job:
        sbatch = {name: getattr(options, name) for name in _SBATCH_OPTIONS}
        if options.gpus or not any(p.default for p in site.partitions):  # the default one will do for a probe
            sbatch["partition"] = options.partition or (choice.partition and choice.partition.name)
        flags = [f"--{key}={value}" for key, value in sbatch.items() if value]
        site.node = run_probe_job(options.folder, flags, options.gpus, options.wait)
    findings, yaml = diagnose(site, choice), format_yaml(site, choice)
    if not options.json:
        print_report(site, findings, yaml)
    data = asdict(site) | {"findings": [asdict(f) for f in findings], "yaml": yaml}
    return CommandResult(data, ExitCode.RUN_FAILED if any(f.level == PROBLEM for f in findings) else ExitCode.DONE)


def format_yaml(site: Site, choice: Choice) -> str:
    """Write a slurm option for this cluster, to be saved as my_conf/slurm/NAME.yaml."""
    name = "".join(c if c.isalnum() else "_" for c in site.name.lower())
    name += "_site" * (name in ("cluster", "local", "site_example"))  # options that we have
    p, options, qos = choice.partition, choice.options, choice.association.qos if choice.association else []
    others = [x.name for x in site.partitions if x is not p]
    longest = _find_longest_time(choice)
    short = longest and (client.seconds(longest) or _SHORT_S) < _SHORT_S
    accounts = [a for a in dict.fromkeys(a.name for a in site.accounts) if a != choice.account]
    lines = [
        _format_line("account", choice.account, "others: ", accounts),
        _format_line("partition", options.partition or (p.name if p else None), "others: ", others),
        _format_line("qos", options.qos, "one of ", qos),
        _format_line("constraint", options.constraint, "one of ", p.features if p else []),
        _format_line("time", longest if short else None, "at most ", [longest] if longest else []),
    ]
    if p:
        lines += [f"# gres: gpu:{kind}:1    # this type of GPU; then gpus: 0" for kind in p.gpus if kind]
    if not p or not p.gpus:
        lines.append("gpus: 0")
    text = "\n".join(filter(None, lines))
    return f"""\
# {site.name}, SLURM {site.version}: save as my_conf/slurm/{name}.yaml, and then
#   python -m cruijff_kit.train -m --config-dir my_conf slurm={name} lora.rank=8,16
defaults:
  - cluster
  - _self_

{text}
"""


def _format_line(key: str, value: str | None, about: str, choices: list[str]) -> str:
    """Format a key with its value; without one, as a comment with the choices."""
    text = f"{key}: {json.dumps(value)}" if value else f"# {key}:"
    return f"{text:<34}# {about}{', '.join(choices)}" if choices else text if value else ""


def _find_longest_time(choice: Choice) -> str | None:
    """Return the longest time that a job may ask for: the least of the limits."""
    limits = [value for name, value, _ in choice.limits if name == "MaxWall"]
    limits += [choice.partition.max_time] if choice.partition else []
    return min(limits, key=lambda t: client.seconds(t) or math.inf, default=None)


def print_report(site: Site, findings: list[Finding], yaml: str) -> None:
    """Print the report for people."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    _print_table(console, f"{site.name}: SLURM {site.version}", [_build_partition_row(p) for p in site.partitions])
    if site.accounts:
        _print_table(console, f"accounts of {site.user}", [_build_account_row(site, a) for a in site.accounts])
    for finding in findings:
        label = f"[{_COLOURS[finding.level]}]{finding.level:<8}[/]"
        console.print(f"{label} {escape(finding.text)}", soft_wrap=True)
    print("", yaml, sep="\n", end="")


def _build_partition_row(p: Partition) -> dict[str, object]:
    row = {"partition": p.name + "*" * p.default, "state": p.state, "time limit": p.max_time, "nodes": p.nodes}
    row |= {"up": p.nodes_up, "idle": p.nodes_idle, "CPUs": _format_range(p.cpus)}
    row["memory GB"] = _format_range([round(mb / 1000) for mb in p.memory_mb])
    return row | {"GPUs": gpu_text(p), "features": ",".join(p.features)}


def _format_range(values: list[int]) -> str:
    return "-".join(map(str, dict.fromkeys((values[0], values[-1])))) if values else ""


def _build_account_row(site: Site, a: Account) -> dict[str, object]:
    limits = [f"{k}={v}" for k, v in a.limits.items()]
    limits += [f"{q}: {k}={v}" for q in a.qos for k, v in site.qos.get(q, {}).items()]
    qos = ",".join(q + "*" * (q == a.default_qos) for q in a.qos)
    name = a.name + "*" * (a.name == site.default_account)
    return {"account": name, "partition": a.partition or "all", "qos": qos, "limits": "  ".join(limits)}


def _print_table(console, title: str, rows: list[dict[str, object]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for head, value in rows[0].items() if rows else ():
        table.add_column(head, overflow="fold", justify="right" if isinstance(value, int) else "left")
    for row in rows:
        table.add_row(*(escape(str(cell)) for cell in row.values()))
    console.print(table)


if __name__ == "__main__":
    raise SystemExit(main())
