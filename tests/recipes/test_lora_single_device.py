"""The single-device recipe, run on the tiny model: what it writes, what it repeats, what it leaves alone."""

import json
import re
import sys

import pytest
import torch
from safetensors.torch import load_file

from cruijff_kit.models import base_model
from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice
from cruijff_kit.training.checkpoint import read_newest_checkpoint
from cruijff_kit.util.errors import UserError

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
    base_model.clear_cache()
    train("b", "lora.rank=16", "seed=3", "dataset.max_samples=24")
    assert adapter(train("c", "lora.rank=8")) == adapter(alone)


def test_only_the_adapter_changes(train, tiny):
    recipe = train("a")
    held = next(iter(base_model._cache.values()))
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


def test_losses_of_validation_rows(train):
    """Their sum over their tokens is the last epoch's validation loss; one row alone has the loss that it had among all."""
    recipe = train("a", "epochs=2")
    found = json.loads(recipe.folder.validation_losses.read_text())
    assert found["epoch"] == 1 and found["row"] == sorted(e.row for e in recipe.val_data)
    assert sum(found["loss"]) / sum(found["labels"]) == pytest.approx(recipe.summary.validation_losses[-1], rel=1e-6)
    row = recipe.val_data[3]
    loss, labels, _ = recipe.forward_only([row])
    at = found["row"].index(row.row)
    assert (found["loss"][at], found["labels"][at]) == (pytest.approx(loss.item(), rel=1e-4), labels)


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


def test_whole_models_on_request(train, tiny):
    """In a folder of its own, without an adapter beside it; transformers reads it and computes what is in memory."""
    from transformers import AutoModelForCausalLM

    recipe = train("a", "epochs=2", "epochs_to_save=last", "save_merged=true")
    folder = recipe.folder.path / "merged" / "epoch_1"
    assert recipe.summary.merged == {1: str(folder)} and not list(folder.glob("adapter*"))
    ids = torch.tensor([recipe.val_data[0].tokens])
    with torch.no_grad():
        recipe.model.eval()
        whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
        assert torch.allclose(whole, recipe.model(ids), atol=2e-4)


def test_accumulation_equals_the_larger_batch(train):
    order = ["group_by_length=false", "lora.dropout=0", "clip_grad_norm=0.5"]
    large = train("a", "batch_size=8", *order)
    small = train("b", "batch_size=2", "gradient_accumulation_steps=4", *order)
    for a, b in zip(lines(large), lines(small), strict=True):
        if "loss" in a:
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_the_last_rows_are_trained_on_too(train):
    recipe = train("a", "dataset.max_samples=21", "batch_size=4", "gradient_accumulation_steps=2", "num_warmup_steps=0")
    assert recipe.summary.steps == 3, "6 batches, 2 per update"


def test_max_steps_per_epoch(train):
    assert train("a", "max_steps_per_epoch=3", "epochs=2").summary.steps == 6


def test_dropout_learns_and_repeats(train):
    first, again = train("a", "lora.dropout=0.3"), train("b", "lora.dropout=0.3")
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


def test_a_loss_that_is_not_a_number_stops_the_run(train, tmp_path):
    options = ["lr=1e20", "epochs=3", "lr_scheduler=constant"]
    with pytest.raises(FloatingPointError, match=r"at step \d+ of 15; try a smaller lr.*is kept in checkpoint/"):
        train("a", *options)
    kept = read_newest_checkpoint(tmp_path / "a" / "checkpoint")
    assert kept["position"][2] == kept["summary"]["steps"] >= 1
    assert all(torch.isfinite(v).all() for v in kept["adapter"].values()), "the last good state"


ROOMY = """
import torch
from cruijff_kit.training.loss import LabelledCrossEntropy

class Small(LabelledCrossEntropy):
    '''Memory for four answers at once.'''
    def forward(self, hidden, targets, output):
        if torch.is_grad_enabled() and len(targets) > 16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(hidden, targets, output)

class None_(LabelledCrossEntropy):
    def forward(self, hidden, targets, output):
        raise torch.OutOfMemoryError("CUDA out of memory")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Writes a module of the user's: name, text."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return write


@pytest.mark.parametrize("dropout", [0, 0.2])
def test_out_of_memory_goes_on_in_smaller_micro_batches(train, own, dropout):
    """The same update again, and the same rows in every update after it."""
    own("roomy", ROOMY)
    options = ["batch_size=8", f"lora.dropout={dropout}", "gradient_accumulation_steps=2"]
    whole, small = train("a", *options), train("b", *options, "torchtune.loss._component_=roomy.Small")
    assert small.changes["batch_size"] in (1, 2, 4) and whole.changes == {}
    assert small.changes["batch_size"] * small.changes["gradient_accumulation_steps"] == 16
    losses = [[line["loss"] for line in lines(r) if "loss" in line] for r in (whole, small)]
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4 if not dropout else 0.5)
    with pytest.raises(torch.OutOfMemoryError):
        train("c", "torchtune.loss._component_=roomy.None_")


METRICS = """
def answers(logits, labels, tokenizer, ignore_index):
    right = (logits.argmax(-1) == labels) | (labels == ignore_index)
    assert logits.shape[:2] == labels.shape and logits.shape[2] == tokenizer.vocab_size
    return {"whole": right.all(1).float().mean(), "rows": len(labels)}

def token_accuracy(logits, labels, tokenizer, ignore_index):
    kept = labels != ignore_index
    return {"token_accuracy": (logits.argmax(-1)[kept] == labels[kept]).float().mean().item()}

def raises(logits, labels, tokenizer, ignore_index):
    return {"x": 1 / 0}

def ours(logits, labels, tokenizer, ignore_index):
    return {"loss": 1.0}
"""


def test_custom_metrics_in_training_and_validation(train, own):
    own("mine", METRICS)
    plain = train("a", "epochs=2")
    recipe = train("b", "epochs=2", "custom_metrics=[mine.answers,mine.token_accuracy]", "run_val_every_n_steps=2")
    steps = [line for line in lines(recipe) if "loss" in line]
    assert all(0 <= line["token_accuracy"] <= 1 and line["rows"] == 8 for line in steps)
    checks = [line for line in lines(recipe) if "validation_loss" in line]
    assert len(checks) > 2 and all(0 <= line["validation_whole"] <= 1 for line in checks)
    last = {k: v for k, v in checks[-1].items() if k.startswith("validation_") and k != "validation_loss"}
    assert recipe.summary.custom_metrics == last and recipe.summary.best_epoch in (0, 1)
    assert adapter(plain, 1) == adapter(recipe, 1), "looking changes nothing"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("mine.raises", "mine.raises raised ZeroDivisionError"),
        ("mine.ours", "mine.ours calls a value 'loss', which is reserved"),
        ("mine.METRICS", "cannot be imported"),
        ("broken.f", "broken.f cannot be imported: No module named 'nowhere'"),
        ("json.codecs", "json.codecs is a module, not a function"),
    ],
)
def test_custom_metrics_that_cannot_work_are_refused_first(train, own, tmp_path, name, says):
    own("mine", METRICS)
    own("broken", "import nowhere")
    with pytest.raises(UserError, match=re.escape(says)):
        train("a", f"custom_metrics=[{name}]")
    assert not (tmp_path / "a").exists()
