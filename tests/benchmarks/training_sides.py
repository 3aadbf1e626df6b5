"""One side of training_speed.py: a process that trains, a block of steps at a time, as it is told on its standard input.

    python training_sides.py ours|stock|peft CASE.json

Orders: `steps N` makes N updates; `profile N` too, and says how long GPU kernels ran; `peak` multiplies matrices; `memory`
tells the peaks. Each answer is a line of JSON. The recipes are not changed: they meet these orders in their metric logger,
which they call after each update.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
MATRIX = {"cpu": 2048, "cuda": 8192}  # side of the square matrices whose product counts as the machine's peak


class Turns:
    """Waits for an order after each block of updates. A torchtune metric logger, so that each recipe reports to it."""

    def __init__(self) -> None:
        self.left, self.losses, self.profiler = 0, [], None
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what else is printed goes to the log

    def start(self, device: str, dtype) -> None:
        """The set-up is done: count the peak of memory from here, and wait for the first order."""
        self.device, self.dtype = device, dtype
        self.set_up = reset_peak_memory(device)
        self._answer({"ready": True})
        self._wait()

    def log_dict(self, payload, step: int) -> None:
        """An update is done."""
        self.losses.append(float(payload["loss"]))
        self.left -= 1
        if self.left == 0:
            synchronize(self.device)
            seconds, processor = time.perf_counter() - self.began, time.process_time() - self.processor_began
            answer = {"seconds": seconds, "processor_seconds": processor, "losses": self.losses}
            self._answer(answer | self._stop_profiler())
            self._wait()

    def log_config(self, config) -> None:
        """Part of torchtune's interface."""

    def close(self) -> None:
        """Part of torchtune's interface."""

    def _wait(self) -> None:
        for line in sys.stdin:
            order, _, count = line.strip().partition(" ")
            if order in ("steps", "profile"):
                self.left, self.losses = int(count), []
                self.profiler = start_profiler() if order == "profile" else None
                self.began, self.processor_began = time.perf_counter(), time.process_time()
                return
            if order == "peak":
                self._answer({"flops": matmul_flops(self.device, self.dtype)})
            elif order == "memory":
                peak = peak_memory(self.device)
                self._answer({"training": peak, "process": max(peak, self.set_up)})
        os._exit(0)  # no more orders; the recipe need not save anything

    def _answer(self, answer: dict) -> None:
        self.answers.write(json.dumps(answer) + "\n")
        self.answers.flush()

    def _stop_profiler(self) -> dict:
        if self.profiler is None:
            return {}
        self.profiler.__exit__(None, None, None)
        microseconds = sum(e.self_device_time_total for e in self.profiler.key_averages())
        return {"kernel_seconds": microseconds / 1e6}


TURNS: Turns | None = None


def turns() -> Turns:
    """The metric logger of this process, as a config names it."""
    return TURNS


class NoTokenizer:
    """In place of a tokenizer: the rows are token ids already."""

    pad_id = 0
    max_seq_len = None


class Rows:
    """The rows of a case, again and again.

    Args:
        tokenizer: given by the recipe.
        path: JSON list of {"tokens": [...], "labels": [...]}.
        count: length of the data set.
        stock: rows as torchtune's recipes want them.
    """

    def __init__(self, tokenizer, path: str, count: int, stock: bool) -> None:
        from cruijff_kit.data.examples import Example

        self.rows = json.loads(Path(path).read_text(encoding="utf-8"))
        self.count = count
        if not stock:
            self.rows = [Example(r["tokens"], r["labels"], 0) for r in self.rows]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int):
        if index >= self.count:
            raise IndexError(index)
        row = self.rows[index % len(self.rows)]
        return dict(row) if isinstance(row, dict) else row


def torchtune_config(case: dict, stock: bool) -> dict:
    """The config of either recipe: ours as `python -m cruijff_kit.train` composes it, with the rows of the case."""
    from sweep_vs_naive import stock_config

    import cruijff_kit

    overrides = [
        "model=hf_llama", f"model.path={case['model']}", "dataset=json", f"dataset.path={case['rows']}",
        "dataset.validation_split=null", "eval=none", f"lora.rank={case['rank']}", f"batch_size={case['batch_size']}",
        f"device={case['device']}", f"dtype={case['dtype']}", f"compile={str(case['compile']).lower()}",
        f"shuffle={str(case['shuffle']).lower()}", f"output_dir={case['folder']}/{'stock' if stock else 'ours'}",
    ]  # fmt: skip
    config = cruijff_kit.compose(overrides)
    cfg = stock_config(config, Path(case["folder"]) / "stock") if stock else dict(config.torchtune)
    if stock:
        cfg |= {"device": case["device"], "loss": STOCK_LOSS[case["stock_loss"]]}
    rows = {"_component_": "training_sides.Rows", "path": case["rows"], "count": case["row_count"], "stock": stock}
    return cfg | {
        "tokenizer": {"_component_": "training_sides.NoTokenizer"},
        "dataset": rows,
        "metric_logger": {"_component_": "training_sides.turns"},
    }


STOCK_LOSS = {
    "chunked": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss", "num_output_chunks": 8},
    "one_chunk": {"_component_": "torchtune.modules.loss.CEWithChunkedOutputLoss", "num_output_chunks": 1},
    "plain": {"_component_": "torch.nn.CrossEntropyLoss", "ignore_index": -100},
}


def train_ours(case: dict) -> None:
    """cruijff_kit's recipe."""
    from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice

    cfg = torchtune_config(case, stock=False)
    cfg["dataset_val"] = {"split": None}
    recipe = LoRAFinetuneRecipeSingleDevice(cfg)
    recipe.setup()
    TURNS.start(case["device"], recipe.machine.dtype)
    recipe.train()


def train_stock(case: dict) -> None:
    """torchtune's recipe."""
    from naive_train import stock_recipe
    from omegaconf import OmegaConf

    recipe_class = stock_recipe()
    cfg = OmegaConf.create(torchtune_config(case, stock=True))
    recipe = recipe_class(cfg)
    recipe.setup(cfg)
    TURNS.start(case["device"], recipe._dtype)
    recipe.train()


def train_peft(case: dict) -> None:
    """A plain loop over a transformers model with peft's adapters."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, get_cosine_schedule_with_warmup

    from cruijff_kit.training.schedule import StepSchedule

    cfg = torchtune_config(case, stock=True)
    device, dtype = torch.device(case["device"]), {"bf16": torch.bfloat16, "fp32": torch.float32}[cfg["dtype"]]
    base = AutoModelForCausalLM.from_pretrained(case["model"], dtype=dtype, attn_implementation="sdpa").to(device)
    # torchtune's names of the modules -> transformers'.
    modules = ["o_proj" if m == "output_proj" else m for m in cfg["model"]["lora_attn_modules"]]
    modules += ["gate_proj", "up_proj", "down_proj"] if cfg["model"]["apply_lora_to_mlp"] else []
    lora = LoraConfig(
        r=cfg["model"]["lora_rank"],
        lora_alpha=cfg["model"]["lora_alpha"],
        target_modules=modules,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, lora, autocast_adapter_dtype=False)  # adapters in the model's precision, as elsewhere
    model.train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    settings = {k: v for k, v in cfg["optimizer"].items() if k != "_component_"}
    optimizer = torch.optim.AdamW(trainable, **settings)
    rows, size = Rows(None, case["rows"], case["row_count"], stock=True), case["batch_size"]
    scheduler = get_cosine_schedule_with_warmup(
        optimizer, StepSchedule.from_config(cfg, len(rows)).warmup, len(rows) // size
    )
    step = torch.compile(model) if case["compile"] else model
    TURNS.start(case["device"], dtype)
    for i in range(0, len(rows), size):
        loss = step(**padded([rows[j] for j in range(i, i + size)], device), use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        TURNS.log_dict({"loss": loss.item()}, i)


def padded(rows: list[dict], device) -> dict:
    """Rows as a batch for transformers, padded on the right to the longest."""
    import torch

    longest = max(len(r["tokens"]) for r in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    labels = torch.full((len(rows), longest), -100)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, r in enumerate(rows):
        tokens[i, : len(r["tokens"])] = torch.tensor(r["tokens"])
        labels[i, : len(r["tokens"])] = torch.tensor(r["labels"])
        mask[i, : len(r["tokens"])] = 1
    return {"input_ids": tokens.to(device), "labels": labels.to(device), "attention_mask": mask.to(device)}


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was given."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize()


def start_profiler():
    """Records GPU kernels."""
    import torch

    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
    profiler.__enter__()
    return profiler


def matmul_flops(device: str, dtype) -> float:
    """Best rate of a product of large matrices, floating-point operations per second."""
    import torch

    n = MATRIX[device.partition(":")[0]]
    a, b = torch.randn(n, n, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        a @ b
        synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * n**3 / best


def reset_peak_memory(device: str) -> int:
    """Begin to count anew (of a process's memory only Linux can); returns the peak until now."""
    peak = peak_memory(device)
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak


def peak_memory(device: str) -> int:
    """Most bytes held: of the GPU by torch, else by the process."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    import resource  # counts the process that started this one too

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main(side: str, case: str) -> None:
    global TURNS
    TURNS = Turns()
    import torch

    settings = json.loads(Path(case).read_text(encoding="utf-8"))
    torch.set_num_threads(settings["threads"])
    torch.set_flush_denormal(True)
    {"ours": train_ours, "stock": train_stock, "peft": train_peft}[side](settings)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    import training_sides  # the configs name this module's classes; the script itself would be a second copy of it

    training_sides.main(*sys.argv[1:])
