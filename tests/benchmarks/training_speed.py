"""Training speed: our recipe beside torchtune's stock recipe and a plain loop over transformers and peft.

    python tests/benchmarks/training_speed.py                    every case, some minutes on two CPUs
    python tests/benchmarks/training_speed.py --cases smollm2-capitalization deep
    python tests/benchmarks/training_speed.py --check            ends with 1 where a floor is missed
    python tests/benchmarks/training_speed.py --device cuda      the shapes of Llama 3.2 1B and 3.1 8B

Each side is a process of its own (training_sides.py); they take turns, some steps each, on the same rows, so that what
else the machine does hits all of them. A ratio is the median over the rounds.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
SIDES = ("ours", "stock", "peft")
FLOOR_REAL, FLOOR_SHAPE = 1.3, 1.0  # tokens per second, ours / the faster of the others
BLOCK_SECONDS = 0.4  # of the slowest side, at least one step
WARM_UP, DISTINCT, ROW_COUNT = 2, 24, 4000  # steps; different batches; rows of the data set
RANK = 8
SPIN = "1000"  # how the threads of every side wait, as in `python -m cruijff_kit.train`; see README.md


@dataclass(frozen=True)
class Shape:
    """A Llama model with random weights."""

    layers: int
    dim: int
    ff: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool = True


SMOLLM2 = Shape(30, 576, 1536, 9, 3, 49152)


@dataclass(frozen=True)
class Case:
    """A model and the rows that it learns."""

    shape: Shape
    batch_size: int = 8
    prompt: tuple[int, int] = (20, 60)
    """Tokens, least and most; drawn for each row."""
    answer: tuple[int, int] = (5, 30)
    prefix: int = 0
    """Tokens of the prompt that all rows have in common."""
    learn_input: bool = False
    dtype: str = "auto"
    compile: bool = False
    real: str | None = None
    """Of SmolLM2: its own weights."""


_small = Shape(8, 512, 1408, 8, 4, 16000)
CPU_CASES = {
    "smollm2-capitalization": Case(SMOLLM2, real="capitalization"),
    "smollm2-instruct": Case(SMOLLM2, batch_size=4, prompt=(40, 160), answer=(20, 100), real="rows"),
    "wide": Case(Shape(2, 2048, 5632, 16, 16, 8000)),
    "deep": Case(Shape(40, 128, 384, 4, 2, 2000)),
    "big-vocabulary": Case(Shape(4, 384, 1024, 6, 2, 128000, tied=False)),
    "grouped-queries": Case(Shape(6, 1024, 2816, 16, 2, 16000)),
    "batch-1": Case(_small, batch_size=1),
    "batch-16": Case(_small, batch_size=16),
    "long-rows": Case(_small, batch_size=4, prompt=(448, 500), answer=(12, 12)),
    "equal-rows": Case(_small, prompt=(56, 56), answer=(8, 8)),
    "learn-input": Case(_small, prompt=(100, 200), answer=(5, 30), learn_input=True),
    "prefix": Case(_small, prompt=(60, 90), answer=(5, 30), prefix=50),
    "fp32": Case(_small, dtype="fp32"),
}

# Not yet run: no machine with a GPU was at hand.
LLAMA_1B, LLAMA_8B = Shape(16, 2048, 8192, 32, 8, 128256), Shape(32, 4096, 14336, 32, 8, 128256, tied=False)
CUDA_CASES = {
    f"{name}-4x{length}{'-compile' if compiled else ''}": Case(
        shape, 4, prompt=(length - 16, length - 16), answer=(16, 16), dtype="bf16", compile=compiled
    )
    for name, shape in (("llama-1b", LLAMA_1B), ("llama-8b", LLAMA_8B))
    for length in (64, 512)
    for compiled in (False, True)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", metavar="CASE", help="only these (default: all of the device)")
    parser.add_argument("--rounds", type=int, default=9, help="blocks of steps of each side (default 9)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of each side (default: all)")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), help="default: bf16 where the machine computes in it")
    parser.add_argument(
        "--stock-loss", choices=("one_chunk", "plain", "chunked"), help="default one_chunk, the fastest"
    )
    parser.add_argument("--check", action="store_true", help="end with 1 where ours is below a floor")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    args = parser.parse_args()
    cases = CUDA_CASES if args.device == "cuda" else CPU_CASES
    unknown = set(args.cases or ()) - set(cases)
    if unknown:
        parser.error(f"unknown cases {', '.join(sorted(unknown))}; there are {', '.join(cases)}")
    report = {}
    for name in args.cases or cases:
        with tempfile.TemporaryDirectory() as folder:
            case = replace(cases[name], dtype=args.dtype or cases[name].dtype)
            report[name] = measure(case, Path(folder), args)
        print(name, in_short(report[name]), file=sys.stderr, flush=True)
    for r in report.values():  # on a busy machine only the best of all cases comes near the peak
        peak = max(other["peak_flops"] for other in report.values() if other["dtype"] == r["dtype"])
        r["share_of_peak"] = {name: flops / peak for name, flops in r["flops"].items()}
    print(json.dumps(report, indent=2)) if args.json else show(report)
    missed = [line for name, r in report.items() for line in floors(name, cases[name], r)]
    print("\n".join(missed), file=sys.stderr)
    if args.check and missed:
        raise SystemExit(1)


def measure(case: Case, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """All sides of a case in turns."""
    rows = case_rows(case)
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    settings = settings_of(case, folder, args) | {"stock_loss": args.stock_loss or "one_chunk"}
    (folder / "case.json").write_text(json.dumps(settings), encoding="utf-8")
    with ExitStack() as stack:
        sides = {side: stack.enter_context(worker(side, folder)) for side in SIDES}
        for side in sides.values():
            side.answer()  # set up
        return {**take_turns(sides, case, rows, args), "dtype": settings["dtype"], "case": asdict(case)}


def settings_of(case: Case, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What a side is told; makes the model, too."""
    return {
        "folder": str(folder), "model": str(model_folder(case, folder, args.device)), "rows": str(folder / "rows.json"),
        "batch_size": case.batch_size, "row_count": ROW_COUNT // case.batch_size * case.batch_size, "rank": RANK,
        "device": args.device, "dtype": dtype_of(case, args.device), "compile": case.compile, "shuffle": False,
        "threads": args.threads,
    }  # fmt: skip


def take_turns(sides: dict[str, "Worker"], case: Case, rows: list[dict], args: argparse.Namespace) -> dict[str, Any]:
    """Warm up, choose the length of a block, then the rounds."""
    first = {name: side.ask(f"steps {WARM_UP}")["losses"][0] for name, side in sides.items()}
    slowest = max(side.ask("steps 1")["seconds"] for side in sides.values())
    steps, done = max(1, round(BLOCK_SECONDS / slowest)), WARM_UP + 1
    seconds, processor = {name: [] for name in sides}, {name: [] for name in sides}
    tokens, peaks = [], []
    for number in range(args.rounds):
        order = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
        for name in order:
            answer = sides[name].ask(f"steps {steps}")
            seconds[name].append(answer["seconds"])
            processor[name].append(answer["processor_seconds"])
        peaks.append(sides["peft"].ask("peak")["flops"])
        block = range(done * case.batch_size, (done + steps) * case.batch_size)
        tokens.append(sum(len(rows[i % len(rows)]["tokens"]) for i in block))
        done += steps
    memory = {name: side.ask("memory") for name, side in sides.items()}
    speed = {name: statistics.median(t / s for t, s in zip(tokens, seconds[name], strict=True)) for name in sides}
    flops = flops_per_token(case.shape)
    result = {
        "steps_per_block": steps,
        "tokens_per_step": sum(tokens) / len(tokens) / steps,
        "tokens_per_second": speed,
        "ratio": {name: median_ratio(seconds[name], seconds["ours"]) for name in sides if name != "ours"},
        "processor_ratio": {name: median_ratio(processor[name], processor["ours"]) for name in sides if name != "ours"},
        "flops": {name: speed[name] * flops for name in sides},
        "peak_flops": max(peaks),
        "memory": memory,
        "first_loss": first,
    }
    if args.device == "cuda":
        result["gpu_busy"] = {name: busy_share(side, steps) for name, side in sides.items()}
    return result


def in_short(r: dict[str, Any]) -> str:
    """A line of progress."""
    memory = {name: round(m["training"] / 1e6) for name, m in r["memory"].items()}
    ratios = [{name: round(value, 2) for name, value in r[key].items()} for key in ("ratio", "processor_ratio")]
    return f"ratio {ratios[0]}, of processor seconds {ratios[1]}, MB {memory}, first losses {r['first_loss']}"


def median_ratio(others: list[float], ours: list[float]) -> float:
    """How many times as long the other side takes."""
    return statistics.median(a / b for a, b in zip(others, ours, strict=True))


def busy_share(side: "Worker", steps: int) -> float:
    """Share of the time in which a kernel ran: the kernels' own times by the profiler, the clock without it."""
    kernels = side.ask(f"profile {steps}")["kernel_seconds"]
    return kernels / side.ask(f"steps {steps}")["seconds"]


class Worker:
    """A side's process."""

    def __init__(self, process: subprocess.Popen, log: Path) -> None:
        self.process, self.log = process, log

    def ask(self, order: str) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, Any]:
        """The next answer.

        Raises:
            SystemExit: the process has ended; the end of its output is shown.
        """
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("\n".join(self.log.read_text(encoding="utf-8").splitlines()[-20:]))
        return json.loads(line)


@contextmanager
def worker(side: str, folder: Path) -> Iterator[Worker]:
    """A side's process, which sets itself up and says when it is ready."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
    path = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH"))))
    log = folder / f"{side}.txt"
    with log.open("w", encoding="utf-8") as errors:
        process = subprocess.Popen(
            [sys.executable, str(HERE / "training_sides.py"), side, str(folder / "case.json")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=kept | {"GOMP_SPINCOUNT": SPIN, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, "CRUIJFF_QUIET": "1"},
        )  # fmt: skip
    try:
        yield Worker(process, log)
    finally:
        process.stdin.close()
        process.wait()


def case_rows(case: Case) -> list[dict[str, list[int]]]:
    """The rows of a case: those of the capitalisation task, or random ids."""
    if case.real == "capitalization":
        return capitalization_rows(DISTINCT * case.batch_size)
    draw = random.Random(0)

    def ids(count: int) -> list[int]:
        return [draw.randrange(10, case.shape.vocab) for _ in range(count)]

    prefix, rows = ids(case.prefix), []
    for _ in range(DISTINCT * case.batch_size):
        prompt = prefix + ids(draw.randint(*case.prompt) - case.prefix)
        answer = ids(draw.randint(*case.answer))
        learnt = 1 if case.learn_input else len(prompt)
        tokens = prompt + answer
        rows.append({"tokens": tokens, "labels": [-100] * learnt + tokens[learnt:]})
    return rows


def capitalization_rows(count: int) -> list[dict[str, list[int]]]:
    """Rows as a run of the default command reads them."""
    from omegaconf import OmegaConf

    import cruijff_kit
    from cruijff_kit.training import process_cache

    cfg = OmegaConf.to_container(OmegaConf.create(cruijff_kit.compose(["eval=none"]).torchtune))
    data = process_cache.get_dataset(cfg["dataset"], cfg["tokenizer"])
    return [{"tokens": data[i].tokens, "labels": data[i].labels} for i in range(count)]


def model_folder(case: Case, folder: Path, device: str) -> Path:
    """SmolLM2's folder, or a new one with random weights."""
    if case.real:
        import cruijff_kit

        return Path(cruijff_kit.compose(["model=smollm2_135m", "eval=none"]).model.path)
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    s = case.shape
    config = LlamaConfig(
        vocab_size=s.vocab, hidden_size=s.dim, intermediate_size=s.ff, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.kv_heads, tie_word_embeddings=s.tied,
        max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype_of(case, device)]
    model.to(dtype).save_pretrained(folder / "model", max_shard_size="100GB")
    if device == "cuda":
        del model
        torch.cuda.empty_cache()
    return folder / "model"


def dtype_of(case: Case, device: str) -> str:
    """bf16 where the machine computes in it."""
    from cruijff_kit.models.device import choose_machine, short_name

    return short_name(choose_machine(device, case.dtype, 1).dtype)


def flops_per_token(s: Shape) -> float:
    """4 operations per weight of the base's matrices and 6 per weight of the adapters; attention apart."""
    head_dim = s.dim // s.heads
    attention = [(s.dim, s.dim), (s.dim, s.kv_heads * head_dim), (s.dim, s.kv_heads * head_dim), (s.dim, s.dim)]
    mlp = [(s.dim, s.ff)] * 3
    base = s.layers * sum(a * b for a, b in attention + mlp) + s.dim * s.vocab
    adapted = [attention[0], attention[2], attention[3], *mlp]  # conf/lora/default.yaml: q, v, output and the MLP
    return 4 * base + 6 * s.layers * RANK * sum(a + b for a, b in adapted)


def floors(name: str, case: Case, result: dict[str, Any]) -> list[str]:
    """What is below its floor, a line each."""
    missed, floor = [], FLOOR_REAL if case.real else FLOOR_SHAPE
    ratio = min(result["ratio"].values())
    if ratio < floor:
        missed.append(f"{name}: {ratio:.2f} times the speed of the faster other side; the floor is {floor}")
    if result["memory"]["ours"]["training"] > result["memory"]["stock"]["training"]:
        missed.append(f"{name}: more memory than the stock recipe")
    spread = max(result["first_loss"].values()) - min(result["first_loss"].values())
    if spread > (0.06 if result["dtype"] == "bf16" else 1e-4) * result["first_loss"]["ours"]:
        missed.append(f"{name}: the sides' first losses differ: {result['first_loss']}")
    return missed


def show(report: dict[str, Any]) -> None:
    """Print the table."""
    busy = any("gpu_busy" in r for r in report.values())
    table = Table(caption="share: of the peak of matrix products, 4P + 6p operations per token of the rows")
    for column in ("case", "tokens per step", "tokens/s: ours", "stock", "peft", "ours / stock", "ours / peft"):
        table.add_column(column, justify="left" if column == "case" else "right")
    for column in (
        "share: ours / stock / peft",
        "MB in training: ours / stock / peft",
        *(["GPU busy"] if busy else []),
    ):
        table.add_column(column, justify="right")
    for name, r in report.items():
        cells = [name, f"{r['tokens_per_step']:.0f}", *(f"{r['tokens_per_second'][s]:.0f}" for s in SIDES)]
        cells += [f"{r['ratio'][s]:.2f}" for s in SIDES[1:]]
        cells.append(" / ".join(f"{r['share_of_peak'][s]:.0%}" for s in SIDES))
        cells.append(" / ".join(f"{r['memory'][s]['training'] / 1e6:.0f}" for s in SIDES))
        if busy:
            cells.append(" / ".join(f"{r['gpu_busy'][s]:.0%}" for s in SIDES))
        table.add_row(*cells)
    Console(highlight=False, width=None if sys.stdout.isatty() else 170).print(table)


if __name__ == "__main__":
    main()
