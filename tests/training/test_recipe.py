"""The single-device recipe, run on the tiny model: what it writes, what it repeats, what it leaves alone."""

import json

import pytest
import torch
from safetensors.torch import load_file

from cruijff_kit.models import base
from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice

SMALL = ["dataset.max_samples=40", "num_warmup_steps=2", "lr=1e-2", "lora.rank=4", "device=cpu", "dtype=fp32"]


@pytest.fixture
def train(set_up_recipe, tiny, tmp_path):
    """Trains with overrides into a folder of a name; returns the recipe."""

    def run(name: str, *overrides: str) -> LoRAFinetuneRecipeSingleDevice:
        where = f"output_dir={tmp_path / name}"
        recipe = set_up_recipe("model=hf_llama", f"model.path={tiny}", where, *SMALL, *overrides)
        recipe.train()
        recipe.cleanup()
        return recipe

    return run


def adapter(recipe, epoch: int = 0) -> bytes:
    return (recipe.folder.epoch(epoch) / "adapter_model.safetensors").read_bytes()


def lines(recipe) -> list[dict]:
    return [json.loads(line) for line in recipe.folder.metrics.read_text().splitlines()]


def test_same_seed_same_bytes_and_another_seed_others(train):
    first, again, other = train("a"), train("b"), train("c", "seed=7")
    assert adapter(first) == adapter(again) != adapter(other)
    timed = ("tokens_per_second_per_gpu", "peak_memory_bytes")
    strip = [[{k: v for k, v in line.items() if k not in timed} for line in lines(r)] for r in (first, again)]
    assert strip[0] == strip[1]


def test_what_the_process_did_before_changes_nothing(train):
    alone = train("a", "lora.rank=8")
    base.release()
    train("b", "lora.rank=16", "seed=3", "dataset.max_samples=24")
    assert adapter(train("c", "lora.rank=8")) == adapter(alone)


def test_only_the_adapter_changes(train, tiny):
    recipe = train("a")
    held = next(iter(base._held.values()))
    before = {k: v.clone() for k, v in held.items()}
    again = train("b")
    assert all(torch.equal(before[k], held[k]) for k in before)
    assert recipe.model.layers[0].attn.q_proj.weight.data_ptr() == again.model.layers[0].attn.q_proj.weight.data_ptr()
    trained = load_file(recipe.folder.epoch(0) / "adapter_model.safetensors")
    assert all(v.abs().max() > 0 for v in trained.values()), "some adapter was never updated"


def test_metrics_of_each_step(train):
    recipe = train("a", "epochs=2", "log_every_n_steps=1")
    steps = [line for line in lines(recipe) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 11))
    assert [line["epoch"] for line in steps] == [0] * 5 + [1] * 5
    expected = {"step", "epoch", "loss", "lr", "grad_norm", "tokens_per_second_per_gpu", "peak_memory_bytes"}
    assert set(steps[0]) == expected
    assert steps[0]["lr"] == 0 and steps[2]["lr"] == pytest.approx(1e-2), "the first step of a warm-up has lr 0"
    validations = [(line["epoch"], line["step"]) for line in lines(recipe) if "validation_loss" in line]
    assert validations == [(0, 5), (1, 10)]
    assert recipe.summary.validation_losses[-1] == recipe.summary.validation_loss < recipe.summary.validation_losses[0]


def test_validation_every_n_steps(train):
    recipe = train("a", "epochs=2", "run_val_every_n_steps=2")
    assert [line["step"] for line in lines(recipe) if "validation_loss" in line] == [2, 4, 5, 6, 8, 10]


def test_no_validation_split_no_validation(train):
    recipe = train("a", "dataset.validation_split=null")
    assert recipe.summary.validation_loss is None
    assert not any("validation_loss" in line for line in lines(recipe))


@pytest.mark.parametrize(
    ("value", "saved"), [("all", [0, 1, 2]), ("none", []), ("last", [2]), ("[0,2]", [0, 2]), ("[]", [])]
)
def test_epochs_to_save(train, value, saved):
    recipe = train("a", "epochs=3", "dataset.max_samples=16", f"epochs_to_save={value}")
    assert sorted(p.name for p in recipe.folder.path.glob("epoch_*")) == [f"epoch_{e}" for e in saved]
    assert sorted(recipe.summary.adapters) == saved


def test_accumulation_equals_the_larger_batch(train):
    order = ["group_by_length=false", "lora.dropout=0", "clip_grad_norm=0.5"]
    large = train("a", "batch_size=8", *order)
    small = train("b", "batch_size=2", "gradient_accumulation_steps=4", *order)
    for a, b in zip(lines(large), lines(small), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_left_over_rows_are_learnt_too(train):
    recipe = train("a", "dataset.max_samples=21", "batch_size=4", "gradient_accumulation_steps=2", "num_warmup_steps=0")
    assert recipe.summary.steps == 3, "6 batches, 2 per update"


def test_max_steps_per_epoch(train):
    assert train("a", "max_steps_per_epoch=3", "epochs=2").summary.steps == 6


def test_dropout_learns_and_repeats(train):
    first, again = train("a", "lora.dropout=0.3"), train("b", "lora.dropout=0.3")
    assert not first.share_prefix
    assert adapter(first) == adapter(again) != adapter(train("c"))


def test_activation_checkpointing_changes_no_result(train):
    plain, saving = train("a"), train("b", "enable_activation_checkpointing=true")
    assert [line["loss"] for line in lines(plain) if "loss" in line] == pytest.approx(
        [line["loss"] for line in lines(saving) if "loss" in line], rel=1e-5
    )


@pytest.mark.parametrize("name", ["linear", "constant"])
def test_schedules(train, name):
    rates = [line["lr"] for line in lines(train("a", f"lr_scheduler={name}")) if "lr" in line]
    expected = {"linear": [0, 0.5, 1, 2 / 3, 1 / 3], "constant": [0, 0.5, 1, 1, 1]}[name]
    assert rates == pytest.approx([1e-2 * e for e in expected])


def test_a_loss_that_is_not_a_number_stops_the_run(train):
    with pytest.raises(FloatingPointError, match=r"at step \d+; try a smaller lr"):
        train("a", "lr=1e20", "epochs=3", "lr_scheduler=constant")
