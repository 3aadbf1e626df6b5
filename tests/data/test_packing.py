"""Packs: every row once, none split, and the same loss and gradients as the rows by themselves."""

import json
import random

import pytest
import torch
import torch.nn.functional as F

import cruijff_kit
from cruijff_kit.data.batches import AttentionCost, make_batch
from cruijff_kit.data.examples import IGNORE, Example
from cruijff_kit.data.packing import pack_sequences, unpack
from cruijff_kit.models.compat import get_adapter_params
from cruijff_kit.runs.plan import plan_run
from cruijff_kit.training.loss import LabelledCrossEntropy, batch_loss
from cruijff_kit.util.errors import UserError

SMALL = ["dataset.max_seq_len=160", "dataset.max_samples=41", "num_warmup_steps=1", "batch_size=2", "lora.rank=4",
         "dtype=fp32", "lr=1e-3"]  # fmt: skip


def rows(seed: int, count: int, prefix: int = 0) -> list[Example]:
    draw = random.Random(seed)
    head = [draw.randrange(3, 259) for _ in range(prefix)]
    made = []
    for _ in range(count):
        prompt = head + [draw.randrange(3, 259) for _ in range(draw.randint(2, 30))]
        answer = [draw.randrange(3, 259) for _ in range(draw.randint(1, 9))]
        made.append(Example(prompt + answer, [IGNORE] * len(prompt) + answer, 0))
    return made


@pytest.mark.parametrize("longest", [40, 100, 1000])
def test_packs_are_filled_in_order(longest):
    examples = rows(1, 80)
    packs = pack_sequences(examples, longest)
    assert [e for p in packs for e in unpack(p)] == examples
    sizes = [len(p.tokens) for p in packs]
    assert max(sizes) <= longest
    for size, following in zip(sizes, packs[1:], strict=False):
        assert size + len(following.examples[0].tokens) > longest, "the next row would have fitted"
    assert packs[0].labels == [label for e in packs[0].examples for label in e.labels]


@pytest.fixture
def recipe(set_up_recipe, tiny, tmp_path):
    def made(*overrides: str):
        where = ["model=hf_llama", f"model.path={tiny}", f"output_dir={tmp_path / 'run'}"]
        return set_up_recipe(*where, *SMALL, *overrides)

    return made


def plain_loss(model, examples: list[Example]) -> torch.Tensor:
    """Row by row through torchtune's own forward."""
    total = torch.zeros(())
    for e in examples:
        logits = model(torch.tensor([e.tokens]))[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(e.labels[1:]), ignore_index=IGNORE, reduction="sum")
    return total


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in get_adapter_params(model).values()]


MASKS, BY_ROWS = AttentionCost(0.0), AttentionCost(1.0, call=0.0)  # as on a GPU, and as on a CPU


@pytest.mark.parametrize("cost", [MASKS, BY_ROWS])
@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("prefix", [0, 12])
def test_loss_and_gradients_are_those_of_the_rows(recipe, share, prefix, cost):
    model = recipe().model
    for name, p in get_adapter_params(model).items():
        if "lora_b" in name:
            torch.nn.init.normal_(p, std=0.05)
    examples = rows(prefix, 19, prefix)
    batch = make_batch(packs := pack_sequences(examples, 200), cost, share)
    assert len(packs) > 2 and batch.num_tokens == sum(len(e.tokens) for e in examples)
    if cost is MASKS:
        assert len(batch.tokens) == len(packs)
        assert batch.tokens.shape[1] <= 200 and bool(batch.mask.any(-1).all())
    loss, plain = batch_loss(model, batch, LabelledCrossEntropy()), plain_loss(model, examples)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(model, loss), gradients(model, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("cost", [MASKS, BY_ROWS])
def test_no_row_sees_another(recipe, cost):
    """Changing one row of a pack leaves the loss of the others bit by bit as it was."""
    model, loss = recipe().model, LabelledCrossEntropy()
    examples = rows(3, 6)

    def losses(changed: list[Example]) -> torch.Tensor:
        batch = make_batch(pack_sequences(changed, 500), cost)
        each = torch.nn.CrossEntropyLoss(reduction="none")
        loss.forward = lambda hidden, targets, output: each(output(hidden), targets)
        return batch_loss(model, batch, loss)

    before = losses(examples)
    other = [*examples[:2], Example([7] * len(examples[2].tokens), examples[2].labels, 0), *examples[3:]]
    after, start = losses(other), 0
    for n, e in enumerate(examples):
        end = start + sum(label != IGNORE for label in e.labels)
        assert torch.equal(before[start:end], after[start:end]) == (n != 2)
        start = end


def test_a_packed_run_counts_packs(recipe):
    """Rows, steps and tokens of the plan are those of the training; validation is not packed."""
    made = recipe("dataset.packed=true", "epochs=2", "shuffle=false", "group_by_length=false")
    packs, alone = made.train_data, recipe().train_data
    assert [r.row for p in packs for r in unpack(p)] == [e.row for e in alone] == list(range(41))
    assert made.steps.per_epoch == -(-len(packs) // 2) < 41 // 2
    assert all(unpack(e) == (e,) for e in made.val_data)
    made.train()
    made.cleanup()
    assert made.summary.tokens == 2 * sum(len(e.tokens) for e in alone) and made.summary.steps == made.steps.total


def test_packs_of_one_update_learn_what_the_rows_would(recipe):
    """One update over all rows: packed and unpacked give the same adapter, up to the order of sums."""
    adapters = []  # AdamW's first step divides each gradient by itself; plain descent shows their size
    plain = ["torchtune.optimizer._component_=torch.optim.SGD", "num_warmup_steps=0", "dataset.validation_split=null"]
    for size in ("batch_size=41", "dataset.packed=true"):
        made = recipe(size, "gradient_accumulation_steps=41", "lr=0.1", *plain)
        made.train()
        made.cleanup()
        adapters.append([p.detach().clone() for p in get_adapter_params(made.model).values()])
        assert made.summary.steps == 1
    for a, b in zip(*adapters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_packed_run_resumes_exactly(recipe, tmp_path):
    from cruijff_kit.recipes.lora_single_device import TrainingInterrupted

    whole = recipe("dataset.packed=true", "epochs=2")
    whole.train()
    whole.cleanup()
    again = ["dataset.packed=true", "epochs=2", f"output_dir={tmp_path / 'again'}"]
    stopped = recipe(*again)
    stopped._end_step = _stop_at(stopped, 2)
    with pytest.raises(TrainingInterrupted):
        stopped.train()
    stopped.cleanup()
    resumed = recipe(*again, "resume_from_checkpoint=true")
    assert resumed.global_step == 2
    resumed.train()
    resumed.cleanup()
    assert resumed.summary.loss == whole.summary.loss
    for a, b in zip(get_adapter_params(resumed.model).values(), get_adapter_params(whole.model).values(), strict=True):
        assert torch.equal(a, b)


def _stop_at(recipe, step: int):
    usual = recipe._end_step

    def end_step() -> None:
        recipe.stop_requested = "stopped" if recipe.global_step == step else None
        usual()

    return end_step


def test_custom_metrics_see_rows(recipe, tmp_path, monkeypatch):
    """Not packs: one row of logits and labels for each row of the data, its own answer in it."""
    (tmp_path / "seen.py").write_text(
        "def rows(logits, labels, tokenizer, ignore_index):\n"
        "    texts = [tokenizer.decode([t for t in row.tolist() if t != ignore_index]) for row in labels]\n"
        "    return {'rows': len(labels), 'words': sum(t.isalpha() and t[0].isupper() for t in texts)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = recipe("dataset.packed=true", "custom_metrics=[seen.rows]", "dataset.validation_split=null")
    made.train()
    made.cleanup()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines and all(line["words"] == line["rows"] > 2 for line in lines)


def test_plan_and_refusals(tiny, tmp_path):
    def compose(*overrides: str):
        where = ["model=hf_llama", f"model.path={tiny}", f"output_dir={tmp_path / 'run'}", "device=cpu", "eval=none"]
        return cruijff_kit.compose([*where, *SMALL, "dataset.packed=true", *overrides])

    plan = plan_run(compose())
    assert plan.packed_rows == 41 and plan.rows < 41 and plan_run(compose("dataset.packed=false")).packed_rows is None
    with pytest.raises(UserError, match="packed=true fills packs up to dataset.max_seq_len, which is null; set it"):
        compose("dataset.max_seq_len=null")
    with pytest.raises(UserError, match="the longest pack has .* reads at most 512; set dataset.max_seq_len=512"):
        plan_run(compose("dataset.max_seq_len=2048", "num_warmup_steps=0"))
