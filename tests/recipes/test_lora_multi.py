"""Runs in a group equal the runs alone: losses of each step, adapters, what they write; a failure is one run's own."""

import functools
import json
import math
import time

import pytest
import torch
from exactness import assert_same_adapters, products_are_exact
from safetensors.torch import load_file

import cruijff_kit
from cruijff_kit.recipes.lora_multi import MultiLoraTrainer, Slot
from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice, TrainingInterrupted
from cruijff_kit.runs.plan import plan_run
from cruijff_kit.training.group_size import GroupSizeTuner

SMALL = ["dataset.max_samples=24", "num_warmup_steps=1", "lr=1e-2", "lora.rank=4", "dtype=fp32"]
# One setting each that groups must stand.
VARIED = [
    ["lora.rank=8"],
    ["lora.rank=16", "lr=2e-3", "seed=3"],
    ["lora.alpha=32", "lr_scheduler=constant", "weight_decay=0.1"],
    ["batch_size=4", "gradient_accumulation_steps=2", "clip_grad_norm=0.5"],
    ["epochs=2", "batch_size=6"],
    ["lora.dropout=0.2", "seed=5"],
    ["lora.dropout=0.1", "batch_size=3", "gradient_accumulation_steps=2"],
    ["lora.attn_modules=[q_proj]", "lora.apply_to_mlp=false"],
    ["lora.use_dora=true", "lora.dropout=0.1"],
    ["dataset=bit_sequences", "dataset.max_samples=20"],
    ["dataset.prompt='{input} ->'", "shuffle=false"],
    ["dataset.packed=true", "dataset.max_seq_len=256", "batch_size=2"],
    ["max_steps_per_epoch=2", "epochs=3", "run_val_every_n_steps=1"],
    ["lr_scheduler=linear", "group_by_length=false", "num_warmup_steps=0"],
    ["'+torchtune.optimizer.betas=[0.8,0.9]'"],
    ["torchtune.optimizer._component_=torch.optim.SGD", "~torchtune.optimizer.fused"],
]


def compose(tiny, folder, *overrides: str):
    """The configuration of a run in a folder, checked."""
    where = ["model=hf_llama", f"model.path={tiny}", "device=cpu", "eval=none", f"output_dir={folder}"]
    overrides = [o.strip("'") if o.startswith("'+") else o for o in overrides]
    config = cruijff_kit.compose([*where, *SMALL, *overrides])
    plan_run(config)
    return config


@pytest.fixture
def config(tiny, tmp_path):
    """A function: name, overrides -> the configuration of a run in a folder of that name."""
    return lambda name, *overrides: compose(tiny, tmp_path / name, *overrides)


def train_alone(config) -> LoRAFinetuneRecipeSingleDevice:
    recipe = LoRAFinetuneRecipeSingleDevice(config.torchtune)
    recipe.setup()
    recipe.train()
    recipe.cleanup()
    return recipe


@pytest.fixture(scope="module")
def alone(tiny, tmp_path_factory):
    """A function: overrides -> the recipe after training alone, once for all tests here."""

    @functools.cache
    def train(*overrides: str) -> LoRAFinetuneRecipeSingleDevice:
        return train_alone(compose(tiny, tmp_path_factory.mktemp("alone") / "run", *overrides))

    return lambda *overrides: train(*(o for o in overrides if o not in SMALL))


def train_together(
    configs: list, trainer: MultiLoraTrainer | None = None, at_once: int | None = None, stop_at: int | None = None
) -> list:
    """The members after training, or what ended them; `stop_at`: the step after which all are asked to stop."""

    def train(config, slot: Slot):
        recipe = slot.make_recipe(config.torchtune)
        recipe.setup()
        usual = recipe._end_step

        def end_step():
            usual()
            if stop_at and recipe.global_step == stop_at - 1:
                recipe.stop_requested = "asked to"

        recipe._end_step = end_step
        recipe.train()
        recipe.cleanup()
        return recipe

    trainer = trainer or MultiLoraTrainer()
    trainer.tuner = GroupSizeTuner(at_once or len(configs))
    return trainer.run([functools.partial(train, c) for c in configs])


def lines(recipe) -> list[dict]:
    found = [json.loads(line) for line in recipe.folder.metrics.read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in ("tokens_per_second_per_gpu", "peak_memory_bytes")} for x in found]


def assert_same(grouped, own, exactly: bool = True) -> None:
    """To the last bit, where the machine allows it: a run's numbers are its own, however many compute with it."""
    if exactly and products_are_exact():
        assert lines(grouped) == lines(own)
    assert [sorted(x) for x in lines(grouped)] == [sorted(x) for x in lines(own)]
    for ours, theirs in zip(lines(grouped), lines(own), strict=True):
        norms = [x.pop("grad_norm", 0.0) for x in (ours, theirs)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)  # a sum of squares of what is rounded
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    for epoch in own.summary.adapters:
        assert_same_adapters(grouped.folder.epoch(epoch), own.folder.epoch(epoch), exactly)


@pytest.mark.parametrize(("number", "dtype"), [(2, "fp32"), (5, "fp32"), (16, "fp32"), (16, "bf16")])
def test_a_group_of_different_runs_equals_the_runs_alone(config, alone, number, dtype):
    chosen = VARIED if number == 16 else VARIED[: number * 3 : 3]
    assert len(chosen) == number
    own = [alone(*more, f"dtype={dtype}") for more in chosen]
    grouped = train_together([config(f"grouped{i}", *more, f"dtype={dtype}") for i, more in enumerate(chosen)])
    for a, b in zip(grouped, own, strict=True):
        assert_same(a, b)


def test_rows_and_ranks_may_be_padded(config, alone):
    """As on a GPU, where a run's own products and calls of attention cost more than pad tokens."""
    padded = []

    class Padded(MultiLoraTrainer):
        def _shared_model(self, member):
            model = super()._shared_model(member)
            model.is_exact = False
            return model

        def _compute_pass(self, group):
            outputs = super()._compute_pass(group)
            padded.append(len({*self._model.sizes}) == 1 < len({len(m.examples) for m in group}))
            return outputs

    chosen = [VARIED[i] for i in (0, 1, 2, 4, 5, 7, 8, 9)]
    grouped = train_together([config(f"grouped{i}", *more) for i, more in enumerate(chosen)], Padded())
    assert any(padded)
    for i, more in enumerate(chosen):
        assert_same(grouped[i], alone(*more), exactly=False)


def test_the_order_of_the_runs_changes_nothing(config):
    chosen = VARIED[:6]
    there = train_together([config(f"there{i}", *more) for i, more in enumerate(chosen)])
    back = train_together([config(f"back{i}", *more) for i, more in reversed([*enumerate(chosen)])])
    for a, b in zip(there, reversed(back), strict=True):
        assert_same(a, b)


def test_every_layer_of_every_adapter_learns_and_padding_is_not_saved(config):
    members = train_together([config(f"rank{rank}", f"lora.rank={rank}") for rank in (2, 5, 16)])
    for member, rank in zip(members, (2, 5, 16), strict=True):
        saved = load_file(member.folder.epoch(0) / "adapter_model.safetensors")
        assert len(saved) == 2 * 4 * 6
        assert all(rank in v.shape for v in saved.values())
        assert all(v.abs().sum(0).gt(0).all() for k, v in saved.items() if "lora_B" in k), "a column for each rank"


@pytest.mark.parametrize("dtype", ["dtype=fp32", "dtype=bf16"])
def test_recomputed_activations_leave_every_adapter_its_gradients(config, alone, dtype):
    more = [["lora.rank=8"], ["seed=3", "batch_size=5"], ["lora.dropout=0.2"], ["lora.use_dora=true"]]
    again = "enable_activation_checkpointing=true"
    grouped = train_together([config(f"grouped{i}", *m, again, dtype) for i, m in enumerate(more)])
    for i, m in enumerate(more):
        assert_same(grouped[i], alone(*m, dtype))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_base_in_four_bits_is_shared_too(config, alone, monkeypatch, dtype):
    monkeypatch.setattr("cruijff_kit.runs.plan._check_quantization", lambda *_: None)  # on a CPU it has no use
    more = [["lora.rank=8"], ["seed=3", "lora.dropout=0.2"], ["lora.use_dora=true"]]
    small = ["lora.quantize_base=true", f"dtype={dtype}"]
    grouped = train_together([config(f"grouped{i}", *m, *small) for i, m in enumerate(more)])
    for i, m in enumerate(more):
        assert_same(grouped[i], alone(*m, *small))


METRICS = """
calls = {"n": 0}

def breaks(logits, labels, tokenizer, ignore_index):
    calls["n"] += 1
    if calls["n"] == 4:
        raise ValueError("the fourth time")
    return {"n": float(calls["n"])}

def exact(logits, labels, tokenizer, ignore_index):
    return {"exact": ((logits.argmax(-1) == labels) | (labels == ignore_index)).all(1).float().mean()}
"""


def test_trouble_of_one_is_not_the_others(config, tmp_path, monkeypatch):
    """A loss that is no number any more, a metric of the user's that raises: the others are as in a group without them."""
    (tmp_path / "pack_metrics.py").write_text(METRICS)
    monkeypatch.syspath_prepend(str(tmp_path))
    good = [["lora.rank=8"], ["seed=3", "custom_metrics=[pack_metrics.exact]"]]
    without = train_together([config(f"without{i}", *more) for i, more in enumerate(good)])
    bad = [["lr=1e30", "num_warmup_steps=0"], ["custom_metrics=[pack_metrics.breaks]"]]
    configs = [config(f"with{i}", *more) for i, more in enumerate([good[0], *bad, good[1]])]
    first, lost, broken, last = train_together(configs)
    assert isinstance(lost, FloatingPointError) and "try a smaller lr" in str(lost)
    assert "pack_metrics.breaks raised ValueError: the fourth time" in str(broken)
    assert_same(first, without[0])
    assert_same(last, without[1])


class Small(MultiLoraTrainer):
    """Has memory for two runs at once."""

    tries = 0

    def _compute_pass(self, group):
        if len(group) > 2:
            self.tries += 1
            with torch.no_grad():  # random numbers are drawn by then
                self._shared_model(group[0].member).compute_losses([m.member.make_batch(m) for m in group])
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super()._compute_pass(group)


def test_out_of_memory_splits_the_group(config, alone, capsys):
    chosen = [["lora.rank=8"], ["lora.dropout=0.2"], ["seed=3"], ["batch_size=4"], ["epochs=2"]]
    trainer = Small()
    grouped = train_together([config(f"grouped{i}", *more) for i, more in enumerate(chosen)], trainer)
    assert trainer.tries == 1 and trainer.tuner.best == 2
    assert "out of memory with 5 runs in one pass; 2 from now on" in capsys.readouterr().err
    for i, more in enumerate(chosen):
        assert not grouped[i].changes
        assert_same(grouped[i], alone(*more))


def test_the_next_run_takes_the_place_of_one_that_has_ended(config, alone):
    seen = []

    class Watched(MultiLoraTrainer):
        def _compute_pass(self, group):
            seen.append(len(group))
            return super()._compute_pass(group)

    chosen = [["max_steps_per_epoch=2"], ["epochs=2"], ["seed=3"], ["seed=4"]]
    grouped = train_together([config(f"grouped{i}", *more) for i, more in enumerate(chosen)], Watched(), at_once=2)
    assert max(seen) == 2 and seen.count(2) > 5, "the first run has two updates and four validation batches"
    for i, more in enumerate(chosen):
        assert_same(grouped[i], alone(*more))


@pytest.mark.parametrize("how", ["alone", "another group", "the same group"])
def test_a_stopped_group_continues_exactly(config, how):
    """Each run from its own state, by itself or with others."""
    chosen = [["lora.rank=8", "epochs=2"], ["lora.dropout=0.2", "epochs=2"], ["seed=3", "epochs=2"]]
    whole = train_together([config(f"whole{i}", *more) for i, more in enumerate(chosen)])
    stopped = train_together([config(f"stopped{i}", *more) for i, more in enumerate(chosen)], stop_at=2)
    assert all(isinstance(s, TrainingInterrupted) for s in stopped)
    again = [config(f"stopped{i}", *more, "resume_from_checkpoint=true") for i, more in enumerate(chosen)]
    if how == "alone":
        went_on = [train_alone(c) for c in again]
    else:
        went_on = (
            train_together(again)
            if how == "the same group"
            else [*train_together(again[:2]), *train_together(again[2:])]
        )
    for a, b in zip(went_on, whole, strict=True):
        assert_same(a, b)
        if how == "the same group":
            name = "adapter_model.safetensors"
            assert (a.folder.epoch(1) / name).read_bytes() == (b.folder.epoch(1) / name).read_bytes()


def test_time_is_shared_out(config):
    members = train_together([config("short", "batch_size=1"), config("long", "batch_size=8")])
    assert all(m.clock() > 0 and math.isfinite(m.clock()) for m in members)


def test_evaluation_takes_time_of_a_run_that_trains_no_more(config):
    """As of one that was interrupted between the two."""

    def evaluate(cells: list) -> list:
        time.sleep(0.04)
        return cells

    def evaluate_alone(n: int, slot: Slot) -> float:
        recipe = slot.make_recipe(config(f"trained{n}").torchtune)
        before = recipe.clock()
        slot.evaluate("an item")
        return recipe.clock() - before

    trainer = MultiLoraTrainer(evaluate=evaluate)
    for seconds in trainer.run([functools.partial(evaluate_alone, n) for n in (1, 2)]):
        assert 0.02 <= seconds < 2


def test_room_for_more_runs_counts_their_adapters(config, monkeypatch):
    """They are there before the first pass, unlike gradients and moments, but no run is without its own."""
    trainer, held = MultiLoraTrainer(), 10**9
    monkeypatch.setattr("cruijff_kit.models.device.used_memory", lambda device: held)
    first, second = train_together(
        [config(name, "max_steps_per_epoch=2", "dtype=bf16") for name in ("first", "second")], trainer
    )
    adapters = 4 * sum(p.numel() for member in (first, second) for p in member.trainable)
    monkeypatch.setattr("cruijff_kit.models.device.peak_memory", lambda device: held + 10**6)
    takes = 2 * (10**6 + adapters)  # four runs, where two came to half of it
    for free, enough in ((1.26, True), (1.24, False)):
        monkeypatch.setattr("cruijff_kit.models.device.available_memory", lambda d, free=free: free * takes - adapters)
        assert trainer.fits_in_memory(2, 4) is enough
