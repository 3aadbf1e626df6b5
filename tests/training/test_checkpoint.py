"""A run that is interrupted, however often and wherever, ends as the run that was not: bit for bit, each step once."""

import functools
import json

import pytest
import torch

from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice, TrainingInterrupted
from cruijff_kit.training.checkpoint import read_newest_checkpoint, write_checkpoint

SMALL = [
    "dataset.max_samples=40", "num_warmup_steps=2", "lr=1e-2", "lora.rank=4", "device=cpu", "epochs=2", "lora.dropout=0.1",
    "gradient_accumulation_steps=2", "batch_size=4", "run_val_every_n_steps=3", "clip_grad_norm=1.0", "eval=none",
]  # fmt: skip


@pytest.fixture
def recipe(set_up_recipe, tiny, tmp_path):
    """A recipe over a folder of a name, set up with overrides."""

    def made(name: str, *overrides: str) -> LoRAFinetuneRecipeSingleDevice:
        where = f"output_dir={tmp_path / name}"
        return set_up_recipe("model=hf_llama", f"model.path={tiny}", where, *SMALL, *overrides)

    return made


@pytest.fixture(scope="module")
def uninterrupted(set_up_recipe, tiny, tmp_path_factory):
    """A function: overrides -> the recipe after training without a stop, once for all tests here."""

    @functools.cache
    def train(*overrides: str) -> LoRAFinetuneRecipeSingleDevice:
        where = f"output_dir={tmp_path_factory.mktemp('whole') / 'run'}"
        recipe = set_up_recipe("model=hf_llama", f"model.path={tiny}", where, *SMALL, *overrides)
        finish(recipe)
        return recipe

    return train


def finish(recipe) -> None:
    recipe.train()
    recipe.cleanup()


def interrupt(recipe, after: int) -> None:
    """Train, asking to stop while the step `after` is under way."""
    train_step = recipe.train_step

    def counted(*args):
        if recipe.global_step + 1 == after:
            recipe.stop_requested = "asked to"
        train_step(*args)

    recipe.train_step = counted
    with pytest.raises(TrainingInterrupted, match=f"asked to at step {after} of 10"):
        recipe.train()
    recipe.cleanup()


def left(recipe) -> tuple[list[bytes], list[dict]]:
    """Both epochs' adapters, and the metrics without what depends on the machine's speed."""
    adapters = [(recipe.folder.epoch(e) / "adapter_model.safetensors").read_bytes() for e in (0, 1)]
    lines = [json.loads(line) for line in recipe.folder.metrics.read_text().splitlines()]
    for line in lines:
        line.pop("tokens_per_second_per_gpu", None)
        line.pop("peak_memory_bytes", None)
    return adapters, lines


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stops", [[1], [5], [9], [3, 5, 6], [1, 2, 3, 4, 5, 6, 7, 8, 9]], ids=str)
def test_interrupted_runs_end_as_the_one_that_was_not(recipe, uninterrupted, stops, dtype):
    whole = uninterrupted(f"dtype={dtype}")
    for stop in stops:
        interrupt(recipe("stopped", f"dtype={dtype}", "resume_from_checkpoint=true"), stop)
    last = recipe("stopped", f"dtype={dtype}", "resume_from_checkpoint=true")
    assert last.global_step == stops[-1]
    finish(last)
    assert left(last) == left(whole)
    peaks = {"peak_memory_bytes": 0, "adapters": {}}
    assert vars(last.summary) | peaks == vars(whole.summary) | peaks


def test_dora_in_bf16_goes_on_exactly(recipe, uninterrupted):
    options = ["dtype=bf16", "lora.use_dora=true", "lr=1e-4"]
    whole = uninterrupted(*options)
    interrupt(recipe("stopped", *options, "resume_from_checkpoint=true"), 3)
    last = recipe("stopped", *options, "resume_from_checkpoint=true")
    state = read_newest_checkpoint(last.folder.checkpoints)
    moments = [s[name] for s in state["optimizer"]["state"].values() for name in ("exp_avg", "exp_avg_sq")]
    assert {t.dtype for t in (*state["adapter"].values(), *moments)} == {torch.float32}
    finish(last)
    assert left(last) == left(whole)


def test_adapters_are_named_where_the_run_lies_now(recipe):
    interrupt(recipe("began", "resume_from_checkpoint=true"), 7)
    began = recipe("began", "resume_from_checkpoint=true")
    assert list(began.summary.adapters) == [0]
    began.cleanup()
    moved = began.folder.path.rename(began.folder.path.with_name("moved"))
    finish(last := recipe("moved", "resume_from_checkpoint=true"))
    assert last.summary.adapters == {0: str(moved / "epoch_0"), 1: str(moved / "epoch_1")}


def test_a_kill_loses_the_steps_since_the_last_checkpoint(recipe, uninterrupted):
    whole = uninterrupted()
    killed = recipe("killed", "checkpoint_every_n_steps=4")
    end_step = killed._end_step

    def dies():
        if killed.global_step == 7:
            raise MemoryError("as if killed: nothing is saved")
        end_step()

    killed._end_step = dies
    with pytest.raises(MemoryError):
        killed.train()
    killed.cleanup()
    again = recipe("killed", "checkpoint_every_n_steps=4", "resume_from_checkpoint=true")
    assert again.global_step == 4
    finish(again)
    assert left(again) == left(whole)


def test_nothing_to_resume_from_is_a_fresh_start(recipe, uninterrupted):
    fresh = recipe("a", "resume_from_checkpoint=true")
    assert fresh.global_step == 0
    finish(fresh)
    whole = uninterrupted()
    assert left(fresh) == left(whole)


def test_only_the_newest_is_kept_and_a_half_written_one_is_not_read(tmp_path):
    for step in (3, 12):
        write_checkpoint(tmp_path, step, {"position": [0, 0, step]})
    (tmp_path / ".step_000000020.pt.99").write_bytes(b"half")
    assert read_newest_checkpoint(tmp_path)["position"] == [0, 0, 12]
    assert [p.name for p in tmp_path.glob("step_*")] == ["step_000000012.pt"]
    write_checkpoint(tmp_path, 21, {"position": [0, 0, 21]})
    assert [p.name for p in tmp_path.iterdir()] == ["step_000000021.pt"]
