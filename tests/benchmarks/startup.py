"""How long our command takes to show a configuration, beside the smallest Hydra app that could do the same.

    python tests/benchmarks/startup.py --runs 7

The two commands take turns, so that a busy machine slows both. Nothing is asserted; the target is at most 1.5.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

TARGET = 1.5
OURS = ("cruijff_kit", [sys.executable, "-m", "cruijff_kit.train", "--cfg", "job"])
BARE = ("bare Hydra app", [sys.executable, "-m", "hello", "--cfg", "job"])
HEAVY = (
    "torch",
    "torchtune",
    "transformers",
    "inspect_ai",
    "datasets",
    "pandas",
    "numpy",
)  # what start-up must not load

HELLO = """
import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def hello(cfg: DictConfig) -> None:
    print(cfg.greeting, cfg.name)


if __name__ == "__main__":
    hello()
"""
CONFIG = "greeting: hello\nname: world\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="pairs that are timed, after one that is not (default 7)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "hello.py").write_text(HELLO, encoding="utf-8")
        Path(folder, "config.yaml").write_text(CONFIG, encoding="utf-8")
        report = measure(Path(folder), args.runs)
    print(json.dumps(report, indent=2)) if args.json else show(report)


def measure(folder: Path, runs: int) -> dict:
    """Time both commands in turns in `folder`, where the bare app lies, and see what ours imports."""
    seconds = {name: [] for name, _ in (OURS, BARE)}
    for number in range(runs + 1):
        for name, command in (OURS, BARE):
            spent = timed(command, folder)
            if number > 0:  # the first pair compiles bytecode and fills the disk's cache
                seconds[name].append(spent)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    modules = imported(OURS[1], folder)
    return {
        "seconds": seconds,
        "median": medians,
        "ratio": medians[OURS[0]] / medians[BARE[0]],
        "target": TARGET,
        "modules_imported": len(modules),
        "heavy_imported": sorted(modules.intersection(HEAVY)),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "cpus": os.cpu_count(),
    }


def timed(command: list[str], folder: Path) -> float:
    """Seconds from start to end of a process."""
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def imported(command: list[str], folder: Path) -> set[str]:
    """Names of the modules that a Python command imports."""
    command = [command[0], "-X", "importtime", *command[1:]]
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return set(re.findall(r"^import time: .*\| +(\S+)$", done.stderr, flags=re.MULTILINE))


def show(report: dict) -> None:
    """Print the report as a table."""
    table = Table(title="python ... --cfg job: seconds per process", title_justify="left")
    for column in ("command", "median", "fastest", "slowest"):
        table.add_column(column, justify="left" if column == "command" else "right")
    for name, values in report["seconds"].items():
        table.add_row(name, *(f"{f(values):.3f}" for f in (statistics.median, min, max)))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"ratio {report['ratio']:.2f} (target: at most {report['target']})")
    heavy = ", ".join(report["heavy_imported"]) or "none of them"
    console.print(f"{report['modules_imported']} modules imported; of {', '.join(HEAVY)}: {heavy}")
    if report["load_average"] is not None:
        console.print(f"{report['cpus']} CPUs, load average {report['load_average']:.2f} at the end")


if __name__ == "__main__":
    main()
