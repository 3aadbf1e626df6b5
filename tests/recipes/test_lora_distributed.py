"""The distributed recipe on two CPU processes (gloo): the same training, and one run whatever happens to a worker."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from forked import ForkedWorker
from safetensors.torch import load_file

import cruijff_kit
from cruijff_kit.recipes.lora_distributed import LoRAFinetuneRecipeDistributed
from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice, TrainingInterrupted
from cruijff_kit.records.result import read_result
from cruijff_kit.runs.plan import plan_run
from cruijff_kit.training import worker_processes

SMALL = [
    "dataset.max_samples=50", "num_warmup_steps=2", "lr=2e-3", "lora.rank=4", "device=cpu", "dtype=fp32", "epochs=2",
    "model=hf_llama", "eval=none", "clip_grad_norm=1", "run_val_every_n_steps=3",
]  # fmt: skip


@pytest.fixture
def recipe(tiny, tmp_path, monkeypatch):
    """A recipe of the kind that the config asks for, over a folder of a name, set up with overrides.

    Its workers are forks, which saves 4 seconds of imports each; those of `long_run` are started as a user's are.
    """
    forking = SimpleNamespace(Popen=ForkedWorker, PIPE=subprocess.PIPE)
    monkeypatch.setattr(worker_processes, "subprocess", forking)

    def made(name: str, *overrides: str):
        config = cruijff_kit.compose([*SMALL, f"model.path={tiny}", f"output_dir={tmp_path / name}", *overrides])
        plan_run(config)
        kind = LoRAFinetuneRecipeDistributed if config.processes > 1 else LoRAFinetuneRecipeSingleDevice
        recipe = kind(config.torchtune)
        recipe.setup()
        return recipe

    return made


def trained(recipe):
    recipe.train()
    recipe.cleanup()
    return recipe


def lines(recipe) -> list[dict]:
    left_out = ("tokens_per_second_per_gpu", "peak_memory_bytes")
    found = [json.loads(line) for line in recipe.folder.metrics.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in left_out} for line in found]


def adapter(recipe, epoch: int) -> dict[str, torch.Tensor]:
    return load_file(recipe.folder.epoch(epoch) / "adapter_model.safetensors")


def test_two_processes_train_as_one(recipe):
    """Losses, validation and gradients at every step: 50 rows by 16 leave two for the last update, one each."""
    one = trained(recipe("one", "batch_size=4", "gradient_accumulation_steps=4"))
    two = trained(recipe("two", "batch_size=4", "gradient_accumulation_steps=2", "gpus=2"))
    assert len(lines(one)) == len(lines(two)) == 8 + 4
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert one.summary.steps == two.summary.steps and one.summary.tokens == two.summary.tokens
    assert one.summary.validation_losses == pytest.approx(two.summary.validation_losses, rel=1e-5)
    rows, theirs = (json.loads(r.folder.validation_losses.read_text()) for r in (one, two))
    assert rows.pop("loss") == pytest.approx(theirs.pop("loss"), rel=1e-4) and rows == theirs
    for name, value in adapter(one, 1).items():
        assert torch.allclose(value, adapter(two, 1)[name], atol=1e-5), name
    in_memory = {n: p for n, p in two.model.named_parameters() if "lora" in n}
    assert all(torch.allclose(p, dict(one.model.named_parameters())[n], atol=1e-5) for n, p in in_memory.items())


@pytest.mark.parametrize("dora", ["false", "true"])
def test_in_bf16_adapters_are_fp32_on_every_process(recipe, dora):
    """A small lr, for which steps in bf16 would be too short."""
    options = ["dtype=bf16", "lr=5e-5", f"lora.use_dora={dora}", "epochs=1", "run_val_every_n_steps=0"]
    one = trained(recipe("one", "batch_size=4", "gradient_accumulation_steps=2", *options))
    two = trained(recipe("two", "batch_size=4", "gpus=2", *options))
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a == pytest.approx(b, rel=0.02)
    saved = adapter(two, 0)
    assert {t.dtype for t in saved.values()} == {torch.float32}
    ours, theirs = (torch.cat([t.flatten() for n, t in x.items() if "lora_B" in n]) for x in (adapter(one, 0), saved))
    assert (ours - theirs).norm() < 0.1 * ours.norm()
    in_memory = {p.dtype for n, p in two.model.named_parameters() if p.requires_grad}
    assert in_memory == {torch.float32}


def test_a_process_without_rows_waits_for_the_others(recipe):
    """33 rows by 8: of the last update one process has a row, and the other none."""
    options = ["dataset.max_samples=33", "enable_activation_checkpointing=true", "epochs=1"]
    one, two = (
        trained(recipe("one", "batch_size=8", *options)),
        trained(recipe("two", "gpus=2", "batch_size=4", *options)),
    )
    for a, b in zip(lines(one), lines(two), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


def test_asked_to_stop_and_resumed_it_ends_as_if_it_had_not(recipe):
    options = ["gpus=2", "batch_size=4", "lora.dropout=0.1"]
    whole = trained(recipe("whole", *options))
    stopped = recipe("stopped", *options)
    handle, stopped_at = stopped._handle, []

    def watched(message: dict) -> None:
        handle(message)
        if stopped.global_step >= 4:
            stopped.stop_requested = "asked to"

    stopped._handle = watched
    with pytest.raises(TrainingInterrupted, match=r"asked to at step \d+ of 14"):
        stopped.train()
    stopped_at.append(stopped.global_step)
    again = recipe("stopped", *options, "resume_from_checkpoint=true")
    assert again.global_step == stopped_at[0] >= 4
    trained(again)
    assert lines(again) == lines(whole)
    assert all(torch.equal(v, adapter(whole, 1)[k]) for k, v in adapter(again, 1).items())


OWN = """
import torch
from cruijff_kit.training.loss import LabelledCrossEntropy

class Small(LabelledCrossEntropy):
    def forward(self, hidden, targets, output):
        if torch.is_grad_enabled() and len(targets) > 16 and torch.distributed.get_rank() == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(hidden, targets, output)

class Breaks(LabelledCrossEntropy):
    calls = 0
    def forward(self, hidden, targets, output):
        Breaks.calls += 1
        if Breaks.calls > 3 and torch.distributed.get_rank() == 1:
            raise KeyError("the worker's own mistake")
        return super().forward(hidden, targets, output)

def half(logits, labels, tokenizer, ignore_index):
    return {"rows": len(labels)}
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's with losses that fail, importable here and in the workers."""
    (tmp_path / "own_losses.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "own_losses", raising=False)


def test_out_of_memory_in_a_worker(recipe, own):
    plain = trained(recipe("a", "gpus=2", "batch_size=8", "custom_metrics=[own_losses.half]"))
    assert sorted(line["rows"] for line in lines(plain) if "loss" in line) == [1] * 2 + [8] * 6, "of each process"
    small = trained(recipe("b", "gpus=2", "batch_size=8", "torchtune.loss._component_=own_losses.Small"))
    assert small.changes["batch_size"] * small.changes["gradient_accumulation_steps"] == 8
    losses = [[line["loss"] for line in lines(r) if "loss" in line] for r in (plain, small)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_error_in_a_worker_brings_its_traceback(recipe, own):
    broken = recipe("a", "gpus=2", "torchtune.loss._component_=own_losses.Breaks")
    with pytest.raises(RuntimeError, match="KeyError: .*the worker's own mistake") as raised:
        broken.train()
    assert "in worker 1 of 2" in raised.value.__notes__[0] and "own_losses.py" in raised.value.__notes__[0]


@pytest.fixture
def long_run(tiny, tmp_path, environment):
    """A run of many steps as a command, in training; the processes that it started."""
    options = [
        *SMALL,
        f"model.path={tiny}",
        "gpus=2",
        "epochs=200",
        "dataset.max_samples=400",
        f"hydra.run.dir={tmp_path}/run",
    ]
    command = [sys.executable, "-m", "cruijff_kit.train", *options, "eval=none"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True)
    metrics, until = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.2)
    workers = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    yield (
        process,
        [p for p in workers if b"lora_distributed" in Path(f"/proc/{p}/cmdline").read_bytes()],
        tmp_path / "run",
    )
    process.kill()
    process.communicate()


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_is_killed_ends_the_run(long_run, number):
    process, workers, folder = long_run
    assert len(workers) == 2
    killed = time.monotonic()
    os.kill(workers[1], number)
    _, printed = process.communicate(timeout=30)
    assert process.returncode == 1 and time.monotonic() - killed < 30
    result = read_result(folder / "result.json")
    assert result.status == "failed" and result.error.phase == "train" and gone(workers[0])
    assert result.error.type == "WorkerDied" and f"was killed by {number.name}" in result.error.message
    assert "WorkerDied" in result.error.traceback and f"killed by {number.name}" in printed
    if number is signal.SIGSEGV:
        assert "its stack" in result.error.traceback and "lora_distributed.py" in result.error.traceback


def test_workers_do_not_outlive_the_run(long_run):
    process, workers, _ = long_run
    process.kill()
    process.wait()
    until = time.monotonic() + 20
    while not all(map(gone, workers)):
        assert time.monotonic() < until
        time.sleep(0.2)
