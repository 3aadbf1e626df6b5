"""Eight adapters of one base model: evaluated in one command, and in eight.

    python tests/benchmarks/posthoc_evaluation.py          SmolLM2 on the CPU, a few minutes
    python tests/benchmarks/posthoc_evaluation.py --check     ends with 1 where one command takes more than 0.6 of the time

The adapters are trained for one step; both sides then evaluate copies of the same runs, and must find the same.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from cruijff_kit.records.result import read_result

MOST = 0.6
TRAIN = ("max_steps_per_epoch=1", "num_warmup_steps=0", "dataset.validation_split=null", "eval=none")
EVALUATE = ("eval=capitalization", "eval.baseline=false")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="the sides take turns; sums are compared")
    parser.add_argument("--check", action="store_true", help=f"end with 1 above {MOST}")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ratio = compare(Path(folder), args.adapters, args.rounds)
    if args.check and ratio > MOST:
        raise SystemExit(1)


def compare(folder: Path, adapters: int, rounds: int) -> float:
    """Train, evaluate both ways, print a line each; the ratio of the times."""
    seeds = ",".join(str(n) for n in range(adapters))
    call("train", "-m", *TRAIN, f"seed={seeds}", f"hydra.sweep.dir={folder / 'trained'}")
    together = apart = 0.0
    for number in range(rounds):
        one, many = (Path(shutil.copytree(folder / "trained", folder / f"{side}{number}")) for side in ("one", "many"))
        together += call("evaluate", str(one), *EVALUATE)
        for run in sorted(many.glob("*/result.json")):
            apart += call("evaluate", str(run.parent), *EVALUATE)
        assert found(one) == found(many)
    print(f"one command:    {together / rounds / adapters:6.2f} s an adapter")
    print(f"{adapters} commands:     {apart / rounds / adapters:6.2f} s an adapter")
    print(f"ratio:          {together / apart:6.2f} (at most {MOST})")
    return together / apart


def found(sweep: Path) -> list[list[dict]]:
    """What each run's tasks measured."""
    return [[e.metrics for e in read_result(p).evaluation] for p in sorted(sweep.glob("*/result.json"))]


def call(command: str, *arguments: str) -> float:
    """Seconds that a command of ours takes."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"cruijff_kit.{command}", *arguments], capture_output=True, text=True, env=os.environ
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
