"""A sweep in groups and the same sweep run by run, each a command of its own, from process start to table.

    python tests/benchmarks/multi_lora_sweep.py                      SmolLM2, 8 runs, two rounds: a quarter of an hour
    python tests/benchmarks/multi_lora_sweep.py --model tiny --runs 16 --alone

Where the time goes is read from result.json: training and evaluation are what each run has of the common passes, added up;
start-up is the rest. With --alone one run by itself takes its turn, too: what many runs cost beside one.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from cruijff_kit.records.result import RunResult, read_result

TINY = Path(__file__).parents[1] / "tiny" / "llama"
MODELS = {"smollm2": (), "tiny": ("model=hf_llama", f"model.path={TINY}", "dtype=fp32")}
SIDES = ("grouped", "run by run", "one run")
COLUMNS = ("all", "start-up", "training", "evaluation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="smollm2")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--multi-lora", default="auto", help="runs at a time")
    parser.add_argument("--alone", action="store_true", help="also one run by itself")
    parser.add_argument("--rounds", type=int, default=2, help="the sides take turns; ratios are of medians")
    parser.add_argument("overrides", nargs="*", help="settings of the runs, such as batch_size=4")
    args = parser.parse_args()
    rates = ",".join(f"{2e-4 * (n + 1):.4g}" for n in range(args.runs))
    sweep = ["-m", *MODELS[args.model], "device=cpu", "report=false", f"lr={rates}", *args.overrides]
    sides = SIDES if args.alone else SIDES[:2]
    times: dict[str, list[list[float]]] = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for side in sides:
                to = Path(folder) / f"{side} {number}"
                multi_lora = args.multi_lora if side == "grouped" else "off"
                more = [f"lr={rates.partition(',')[0]}"] if side == "one run" else []
                wall = call([*sweep, *more, f"multi_lora={multi_lora}", f"hydra.sweep.dir={to}"])
                results = [read_result(p) for p in sorted(to.glob("*/result.json"))]
                train, evaluate = (sum(seconds(r, phase) for r in results) for phase in ("train", "evaluate"))
                times[side].append([wall, wall - train - evaluate, train, evaluate])
                if side == "grouped":
                    print(results[-1].multi_lora, flush=True)
            check(Path(folder), number)
    print(f"{args.model}, {args.runs} runs, {args.rounds} rounds; seconds, medians")
    print(" " * 12 + "".join(f"{column:>11}" for column in COLUMNS))
    found = {side: [median(column) for column in zip(*times[side], strict=True)] for side in sides}
    for side in sides:
        print(f"{side:12}" + "".join(f"{value:11.1f}" for value in found[side]))
    for side in sides[1:]:
        ratios = (b / a for a, b in zip(found["grouped"], found[side], strict=True))
        print(f"{'/ grouped':12}" + "".join(f"{ratio:11.2f}" for ratio in ratios))


def seconds(result: RunResult, phase: str) -> float:
    """What a phase of a run took."""
    return result.seconds.get(phase, 0.0)


def check(folder: Path, number: int) -> None:
    """Both sides must have come to the same, but for rounding."""
    for grouped in sorted((folder / f"{SIDES[0]} {number}").glob("*/result.json")):
        ours = read_result(grouped).training["loss"]
        theirs = read_result(folder / f"{SIDES[1]} {number}" / grouped.parent.name / "result.json").training["loss"]
        assert abs(ours - theirs) <= 0.05 * theirs + 0.005, (grouped.parent.name, ours, theirs)


def call(arguments: list[str]) -> float:
    """Seconds that the command takes."""
    began = time.monotonic()
    command = [sys.executable, "-m", "cruijff_kit.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.monotonic() - began


if __name__ == "__main__":
    main()
