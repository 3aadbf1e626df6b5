"""Passes of several runs at once beside passes of each run by itself, on every shape of training_speed.py and tiny ones.

    python tests/benchmarks/multi_lora_passes.py                every case, half a minute to two minutes each on two CPUs
    python tests/benchmarks/multi_lora_passes.py --cases tiny smollm2-capitalization --runs 16
    python tests/benchmarks/multi_lora_passes.py --device cuda  the shapes of Llama 3.2 1B and 3.1 8B

Forward and back, the rows of an update of each run, no optimiser. The sizes take turns on the same rows in one process; a
ratio is the median over the rounds. What multi_lora=auto compares, and why it groups runs or does not.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import training_sides  # noqa: E402  (the configs name its classes)
from training_speed import (  # noqa: E402
    CPU_CASES,
    CUDA_CASES,
    SPIN,
    Case,
    Shape,
    case_rows,
    median_ratio,
    settings_of,
)

os.environ.setdefault("GOMP_SPINCOUNT", SPIN)
TINY = Shape(4, 128, 336, 4, 2, 259)
CASES = {
    "cpu": CPU_CASES | {"tiny": Case(TINY, dtype="fp32"), "tiny-batch-1": Case(TINY, batch_size=1, dtype="fp32")},
    "cuda": {name: case for name, case in CUDA_CASES.items() if not case.compile},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only these (default: all of the device)")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="print JSON, too")
    args = parser.parse_args()
    cases, sizes = CASES[args.device], [2**n for n in range(args.runs.bit_length()) if 2**n <= args.runs]
    unknown = set(args.cases or ()) - set(cases)
    if unknown:
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    print(f"{'seconds for 1000 tokens':24}" + "".join(f"{size:>9}" for size in sizes) + "   alone / best   processor")
    report = {}
    for name in args.cases or cases:
        with tempfile.TemporaryDirectory() as folder:
            found = report[name] = measure(cases[name], Path(folder), sizes, args)
        cells = "".join(f"{value:9.4f}" for value in found["seconds"])
        print(f"{name:24}{cells}{found['ratio']:15.2f}{found['processor_ratio']:12.2f}", flush=True)
    if args.json:
        print(json.dumps(report))


def measure(case: Case, folder: Path, sizes: list[int], args: argparse.Namespace) -> dict:
    """Seconds for 1000 tokens of each size, and how many times the best one's time a run by itself takes."""
    import torch

    from cruijff_kit.data.examples import Example
    from cruijff_kit.recipes.lora_multi import GroupMember, MicroBatch, MultiLoraTrainer

    torch.set_num_threads(args.threads)
    rows = [Example(r["tokens"], r["labels"], 0) for r in case_rows(case)]
    (folder / "rows.json").write_text(json.dumps([{"tokens": r.tokens, "labels": r.labels} for r in rows]))
    settings = settings_of(case, folder, args)
    training_sides.TURNS = Silent()
    trainer = MultiLoraTrainer()
    runs = []
    for n in range(max(sizes)):
        cfg = training_sides.torchtune_config({**settings, "folder": str(folder / str(n))}, stock=False)
        runs.append(GroupMember(cfg | {"dataset_val": {"split": None}}, trainer))
        runs[-1].setup()
    seconds, processor = {size: [] for size in sizes}, {size: [] for size in sizes}
    tokens = []
    for number in range(-1, args.rounds):  # the first warms up
        starts = [(n + (number + 1) * len(runs)) * case.batch_size for n in range(len(runs))]
        batches = [[rows[(at + i) % len(rows)] for i in range(case.batch_size)] for at in starts]
        micro_batches = [MicroBatch(run, batch, True) for run, batch in zip(runs, batches, strict=True)]
        for size in sizes if number % 2 else reversed(sizes):
            training_sides.synchronize(args.device)
            began, processor_began = time.perf_counter(), time.process_time()
            for first in range(0, len(micro_batches), size):
                trainer._compute_pass(micro_batches[first : first + size])
            training_sides.synchronize(args.device)
            if number >= 0:
                seconds[size].append(time.perf_counter() - began)
                processor[size].append(time.process_time() - processor_began)
            for run in runs:
                run.optimizer.zero_grad(set_to_none=True)
        tokens += [sum(len(r.tokens) for batch in batches for r in batch)] if number >= 0 else []
    ratios, of_processor = (
        {size: median_ratio(took[1], took[size]) for size in sizes} for took in (seconds, processor)
    )
    best = max(ratios, key=ratios.get)
    return {
        "case": asdict(case),
        "sizes": sizes,
        "seconds": [1000 * median(s / t for s, t in zip(seconds[size], tokens, strict=True)) for size in sizes],
        "best": best,
        "ratio": ratios[best],
        "processor_ratio": of_processor[best],
    }


class Silent:
    """In place of a metric logger."""

    def log_dict(self, payload, step: int) -> None: ...

    def log_config(self, config) -> None: ...

    def close(self) -> None: ...


if __name__ == "__main__":
    main()
