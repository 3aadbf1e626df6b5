"""A sweep of four runs by our one line, beside the same four runs the usual way, one process per step.

    python tests/benchmarks/sweep_vs_naive.py              one pair, a few minutes on a CPU
    python tests/benchmarks/sweep_vs_naive.py --quick      one run on few rows, to see that everything works

Ours: `python -m cruijff_kit.train -m lora.rank=8,16 lr=1e-3,5e-4`, with an empty cache but for the base model.
Naive: for each run torchtune's stock recipe, then `inspect eval` with its `hf` provider on the merged weights that it
saved; and `inspect eval` on the base model. Same rows, prompts, steps and settings; each process tuned to be fast.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import cruijff_kit

HERE = Path(__file__).resolve().parent
RUNS = ["lora.rank=8,16", "lr=1e-3,5e-4"]
QUICK_RUNS = ["lora.rank=8", "lr=1e-3"]
QUICK = ["dataset.max_samples=64", "dataset.arguments.num_words=200", "num_warmup_steps=2"]
TARGET, AIM = 1.6, 2.5
PHASES = ("start-up", "training", "evaluation")
OPENMP = "GOMP_SPINCOUNT=1000"  # how the naive processes' threads wait; what was measured: README.md
CONNECTIONS = 100  # prompts that the hf provider decodes at once


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=1, help="each runs ours, then the naive way (default 1)")
    parser.add_argument("--runs", nargs="+", metavar="OVERRIDE", help=f"the sweep (default: {' '.join(RUNS)})")
    parser.add_argument("--quick", action="store_true", help="one run, few rows")
    parser.add_argument(
        "--openmp", default=OPENMP, metavar="KEY=VALUE", help=f"naive threads' waiting (default {OPENMP})"
    )
    parser.add_argument("--keep", metavar="DIR", help="work there and keep everything (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the tables")
    args = parser.parse_args()
    sweep = args.runs or (QUICK_RUNS if args.quick else RUNS)
    with workplace(args.keep) as folder:
        report = measure(folder, sweep, QUICK if args.quick else [], args.pairs, args.openmp)
    print(json.dumps(report, indent=2)) if args.json else show(report)


def measure(folder: Path, sweep: list[str], fixed: list[str], pairs: int, openmp: str) -> dict[str, Any]:
    """All pairs, one after the other.

    Args:
        folder: where to work.
        sweep: overrides with the values to sweep over.
        fixed: overrides that all runs share.
        pairs: how often.
        openmp: an environment variable for the naive processes, KEY=VALUE.
    """
    grid = [list(run) for run in itertools.product(*map(alternatives, sweep))]
    configs = {" ".join(run): cruijff_kit.compose([*run, *fixed]) for run in grid}
    first = next(iter(configs.values()))
    # Not part of either side: a dry run makes the base model's folder, and the data file that the naive side reads.
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cruijff_kit.train", *grid[0], *fixed, "dry_run=true"]
    process(command, folder, {}, folder / "preparation.txt")
    environment, measured = naive_environment(openmp), []
    for number in range(pairs):
        place = folder / f"pair{number}"
        say(f"pair {number + 1} of {pairs}: ours")
        ours = run_ours(place / "ours", [*sweep, *fixed], Path(first.model.path).parent)
        say(f"pair {number + 1} of {pairs}: naive")
        naive = run_naive(place / "naive", configs, environment)
        measured.append({"ours": ours, "naive": naive, "ratio": naive["seconds"] / ours["seconds"]})
    return {
        "sweep": sweep,
        "fixed": fixed,
        "pairs": measured,
        "ratio": statistics.median(p["ratio"] for p in measured),
        "target": TARGET,
        "aim": AIM,
        "cpus": usable_cpus(),
        "openmp": openmp,
    }


def run_ours(folder: Path, overrides: list[str], models: Path) -> dict[str, Any]:
    """The sweep in one process, with a cache that holds nothing but the converted base models."""
    folder.mkdir(parents=True)
    (folder / "cache").mkdir()
    (folder / "cache" / "models").symlink_to(models, target_is_directory=True)
    load, cpu = load_average(), cpu_seconds()
    command = [sys.executable, "-m", "cruijff_kit.train", "-m", *overrides]
    seconds = process(command, folder, {"CRUIJFF_CACHE": str(folder / "cache")}, folder / "output.txt")
    cpu = cpu_seconds() - cpu
    results = [json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("multirun/*/*/*/result.json")]
    results.sort(key=lambda r: r["started"])
    spent = {name: sum(r["seconds"].get(name, 0) for r in results) for name in ("baseline", "train", "evaluate")}
    phases = {"training": spent["train"], "evaluation": spent["baseline"] + spent["evaluate"]}
    phases["start-up"] = seconds - sum(phases.values())
    runs = [
        {
            "name": r["name"],
            "seconds": r["seconds"],
            "loss": r["training"]["loss"],
            "steps": r["training"]["steps"],
            "accuracy": accuracy(r["evaluation"][0]["metrics"]),
        }
        for r in results
    ]
    base_model = accuracy(results[0]["baseline"][0]["metrics"])
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "phases": phases,
        "runs": runs,
        "base_model": base_model,
        "load_average": load,
    }


def run_naive(folder: Path, configs: dict[str, Any], environment: dict[str, str]) -> dict[str, Any]:
    """Each run's training and evaluation, and the base model's, in processes of their own."""
    folder.mkdir(parents=True)
    load, cpu, phases, runs = load_average(), cpu_seconds(), dict.fromkeys(PHASES, 0.0), []
    for number, (name, config) in enumerate(configs.items()):
        place = folder / f"run{number}"
        place.mkdir()
        trained, merged = train_naive(place, config, environment)
        evaluated, right = evaluate_naive(place, config, merged, environment)
        for phase in PHASES:
            phases[phase] += trained.get(phase, 0) + evaluated.get(phase, 0)
        runs.append({"name": name, "train": trained, "evaluate": evaluated, "accuracy": right})
        shutil.rmtree(merged)
    config = next(iter(configs.values()))
    evaluated, base_model = evaluate_naive(folder, config, Path(config.model.path), environment)
    for phase in PHASES:
        phases[phase] += evaluated.get(phase, 0)
    return {
        "seconds": sum(phases.values()),  # of the processes: what this script does between them does not count
        "cpu_seconds": cpu_seconds() - cpu,
        "phases": phases,
        "runs": runs,
        "base_model": base_model,
        "load_average": load,
    }


def train_naive(place: Path, config: Any, environment: dict[str, str]) -> tuple[dict[str, float], Path]:
    """Train one run with the stock recipe; returns the seconds of each phase and the folder of the merged model."""
    import yaml

    cfg, moments = stock_config(config, place), place / "moments.json"
    (place / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False), encoding="utf-8")
    command = [sys.executable, str(HERE / "naive_train.py"), "config.yaml", moments.name]
    seconds = process(command, place, environment, place / "train.txt")
    at = json.loads(moments.read_text(encoding="utf-8"))
    training = at["trained"] - at["ready"]
    merged = place / f"epoch_{cfg['epochs'] - 1}"
    for file in merged.glob("adapter_*"):
        file.unlink()  # beside merged weights, transformers would apply the adapter a second time
    return {"start-up": seconds - training, "training": training}, merged


def evaluate_naive(
    place: Path, config: Any, model: Path, environment: dict[str, str]
) -> tuple[dict[str, float], float]:
    """Ask one saved model the test split; returns the seconds of each phase and the accuracy."""
    logs, data = place / "logs", config.dataset
    task = {"data": data.path, "split": data.test_split, "prompt": data.prompt}
    (place / "task.json").write_text(json.dumps(task), encoding="utf-8")
    command = [sys.executable, "-m", "inspect_ai", "eval", f"{HERE / 'naive_task.py'}@capitalization"]
    command += ["--model", "hf/model", "-M", f"model_path={model}", "-M", f"dtype={torch_dtype(config)}"]
    command += ["-M", "device=cpu", "-M", "do_sample=false"]
    command += ["--task-config", "task.json"]
    command += ["--max-tokens", str(config.eval.max_tokens), "--max-connections", str(CONNECTIONS)]
    command += ["--display", "none", "--no-log-realtime", "--log-dir", str(logs)]
    seconds = process(command, place, environment, place / "eval.txt")
    (file,) = logs.glob("*.eval")
    log = read_log(file)
    evaluation = log["seconds"]
    return {"start-up": seconds - evaluation, "evaluation": evaluation}, log["accuracy"]


def stock_config(config: Any, place: Path) -> dict[str, Any]:
    """Our run's torchtune config as the stock recipe takes it, in its fastest settings for a CPU."""
    ours = config.torchtune
    same = (
        "model",
        "tokenizer",
        "optimizer",
        "lr_scheduler",
        "seed",
        "shuffle",
        "batch_size",
        "epochs",
        "max_steps_per_epoch",
        "gradient_accumulation_steps",
        "clip_grad_norm",
        "compile",
        "log_every_n_steps",
        "resume_from_checkpoint",
        "enable_activation_checkpointing",
        "enable_activation_offloading",
    )
    return {
        **{key: ours[key] for key in same},
        "output_dir": str(place),
        "checkpointer": {
            **ours["checkpointer"],
            "_component_": "torchtune.training.FullModelHFCheckpointer",
            "output_dir": str(place),
        },
        "save_adapter_weights_only": False,
        "dataset": {**ours["dataset"], "_component_": "naive_train.ChatRows"},
        # Its default of 8 chunks copies the output weights for each of them, which on a CPU costs most of the step.
        "loss": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss", "num_output_chunks": 1},
        "metric_logger": {"_component_": "torchtune.training.metric_logging.DiskLogger", "log_dir": str(place / "log")},
        "log_peak_memory_stats": False,
        "device": "cpu",
        "dtype": "bf16" if torch_dtype(config) == "bfloat16" else "fp32",
    }


def torch_dtype(config: Any) -> str:
    """The precision that our run computes in on this machine, by torch's name."""
    from cruijff_kit.models import device

    chosen = device.choose_machine("cpu", config.torchtune["dtype"], None)
    return str(chosen.dtype).removeprefix("torch.")


def naive_environment(openmp: str) -> dict[str, str]:
    """All processors, the given way of waiting, and no look-ups of models on a network."""
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    return {
        "OMP_NUM_THREADS": str(usable_cpus()),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
        **dict([openmp.split("=", 1)]),
    }


def process(command: list[str], folder: Path, environment: dict[str, str], output: Path) -> float:
    """Run a process to its end; its output goes into a file. Returns its seconds.

    Raises:
        SystemExit: it failed; the end of its output is shown.
    """
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    started = time.perf_counter()
    with output.open("w", encoding="utf-8") as file:
        done = subprocess.run(command, cwd=folder, env=kept | environment, stdout=file, stderr=subprocess.STDOUT)
    seconds = time.perf_counter() - started
    if done.returncode != 0:
        tail = "\n".join(output.read_text(encoding="utf-8").splitlines()[-20:])
        raise SystemExit(f"{tail}\n{' '.join(command)} ended with {done.returncode}")
    return seconds


def read_log(file: Path) -> dict[str, float]:
    """Accuracy of an inspect-ai log, and the seconds from its first sample's start to its last one's end."""
    from inspect_ai.log import read_eval_log

    log = read_eval_log(str(file))
    if log.status != "success":
        raise SystemExit(f"{file}: {log.status}")
    begun = min(datetime.fromisoformat(s.started_at) for s in log.samples)
    ended = max(datetime.fromisoformat(s.completed_at) for s in log.samples)
    metrics = {s.name: {name: m.value for name, m in s.metrics.items()} for s in log.results.scores}
    return {"seconds": (ended - begun).total_seconds(), "accuracy": accuracy(metrics)}


def accuracy(metrics: dict[str, dict[str, float]]) -> float:
    """Share of exact answers."""
    return metrics["match"]["accuracy"]


def alternatives(override: str) -> list[str]:
    """key=a,b -> [key=a, key=b]."""
    key, _, values = override.partition("=")
    return [f"{key}={value}" for value in values.split(",")]


def usable_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_seconds() -> float:
    """Processor seconds of all child processes that have ended; other programs on the machine hardly change them."""
    times = os.times()
    return times.children_user + times.children_system


def load_average() -> float | None:
    """Of the last minute; tells whether the machine was quiet."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


@contextmanager
def workplace(keep: str | None) -> Iterator[Path]:
    """The given folder, or one that is deleted afterwards."""
    if keep is not None:
        yield Path(keep).absolute()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


def show(report: dict[str, Any]) -> None:
    """Print the report as tables."""
    console = Console(highlight=False)
    for number, pair in enumerate(report["pairs"], 1):
        console.print(seconds_table(pair, f"pair {number}: {' '.join([*report['sweep'], *report['fixed']])}"))
        console.print(accuracy_table(pair))
    console.print(
        f"naive / ours: {report['ratio']:.2f} (target: at least {report['target']}, aim {report['aim']}); "
        f"{report['cpus']} CPUs"
    )


def seconds_table(pair: dict[str, Any], title: str) -> Table:
    """Seconds of each phase on both sides."""
    table = Table(title=title, title_justify="left")
    for column in ("seconds", "ours", "naive", "naive / ours"):
        table.add_column(column, justify="left" if column == "seconds" else "right")
    for phase in PHASES:
        ours, naive = pair["ours"]["phases"][phase], pair["naive"]["phases"][phase]
        table.add_row(phase, f"{ours:.1f}", f"{naive:.1f}", f"{naive / ours:.2f}")
    table.add_section()
    table.add_row("all", f"{pair['ours']['seconds']:.1f}", f"{pair['naive']['seconds']:.1f}", f"{pair['ratio']:.2f}")
    cpu = [pair[side]["cpu_seconds"] for side in ("ours", "naive")]
    table.add_row("processor seconds", *(f"{c:.1f}" for c in cpu), f"{cpu[1] / cpu[0]:.2f}")
    loads = [pair[side]["load_average"] for side in ("ours", "naive")]
    table.add_row("load average before", *("?" if load is None else f"{load:.2f}" for load in loads))
    return table


def accuracy_table(pair: dict[str, Any]) -> Table:
    """Accuracy of each run on both sides, and of the base model."""
    table = Table()
    for column in ("accuracy", "ours", "naive"):
        table.add_column(column, justify="left" if column == "accuracy" else "right")
    table.add_row("base model", f"{pair['ours']['base_model']:.3f}", f"{pair['naive']['base_model']:.3f}")
    for ours, naive in zip(pair["ours"]["runs"], pair["naive"]["runs"], strict=True):
        table.add_row(naive["name"], f"{ours['accuracy']:.3f}", f"{naive['accuracy']:.3f}")
    return table


if __name__ == "__main__":
    main()
