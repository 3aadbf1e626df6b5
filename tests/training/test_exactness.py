"""What saves work must not change the result: label positions only, shared prefixes, length groups, accumulation."""

import random

import pytest
import torch
import torch.nn.functional as F

from cruijff_kit.data.batches import AttentionCost, Spans, batch_order, common_prefix, make_batch
from cruijff_kit.data.examples import IGNORE, Example
from cruijff_kit.models.base_model import build, read_base
from cruijff_kit.models.compat import get_adapter_params, set_seed
from cruijff_kit.models.device import Machine
from cruijff_kit.training.loss import LabelledCrossEntropy, StepOutput, attention_cost, batch_loss
from cruijff_kit.training.validation import eval_mode, validation_batches, validation_sums

CPU = Machine(torch.device("cpu"), torch.float32, 1)
FREE = AttentionCost(0.0)  # attention that costs nothing, so that sharing a prefix always pays
BY_ROWS = AttentionCost(1.0, call=0.0)  # so expensive that it goes row by row


@pytest.fixture
def model(tiny, tmp_path):
    config = {
        "_component_": "cruijff_kit.models.llama.lora_hf_llama", "checkpoint_dir": str(tiny),
        "lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True, "lora_rank": 4,
    }  # fmt: skip
    checkpointer = {
        "_component_": "torchtune.training.FullModelHFCheckpointer", "checkpoint_dir": str(tiny),
        "checkpoint_files": ["model.safetensors"], "recipe_checkpoint": None, "output_dir": str(tmp_path),
        "model_type": "LLAMA3_2",
    }  # fmt: skip
    set_seed(0)
    model = build(config, read_base(checkpointer, CPU), CPU)
    for name, p in get_adapter_params(model).items():
        if "lora_b" in name:  # starts at zero, where its gradient would hide errors in lora_a's
            torch.nn.init.normal_(p, std=0.05)
    return model


def rows(seed: int, count: int, prefix: int, longest: int = 20, scattered: bool = False) -> list[Example]:
    """Random rows with a common prefix, prompts and answers of random lengths; labels scattered on request."""
    draw = random.Random(seed)
    head = [draw.randrange(3, 259) for _ in range(prefix)]
    made = []
    for _ in range(count):
        prompt = head + [draw.randrange(3, 259) for _ in range(draw.randint(1, longest))]
        answer = [draw.randrange(3, 259) for _ in range(draw.randint(1, 6))]
        tokens = prompt + answer
        labels = [IGNORE] * len(prompt) + answer
        if scattered:
            labels = [t if i >= len(prompt) and draw.random() < 0.6 or i == len(prompt) else IGNORE
                      for i, t in enumerate(tokens)]  # fmt: skip
        made.append(Example(tokens, labels, 0))
    return made


def plain_loss(model, examples: list[Example]) -> torch.Tensor:
    """Row by row through torchtune's own forward, every position's logits, the usual shift."""
    total = torch.zeros(())
    for e in examples:
        logits = model(torch.tensor([e.tokens]))[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(e.labels[1:]), ignore_index=IGNORE, reduction="sum")
    return total


def gradients(model, loss: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in get_adapter_params(model).values()]


@pytest.mark.parametrize("layout", ["masked", "by rows", "padded"])
@pytest.mark.parametrize("prefix", [0, 1, 7, 40])
@pytest.mark.parametrize("scattered", [False, True])
def test_loss_and_gradients_equal_the_plain_computation(model, layout, prefix, scattered):
    examples = rows(prefix, 6, prefix, scattered=scattered)
    batch = make_batch(examples, BY_ROWS if layout == "by rows" else FREE, layout != "padded")
    assert isinstance(batch.mask, {"masked": torch.Tensor, "by rows": Spans, "padded": type(None)}[layout])
    ours = batch_loss(model, batch, LabelledCrossEntropy())
    plain = plain_loss(model, examples)
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients(model, ours), gradients(model, plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_row_that_is_all_prefix_of_another(model):
    long = Example([5, 6, 7, 8, 9, 10], [IGNORE] * 3 + [8, 9, 10], 0)
    short = Example([5, 6, 7, 8], [IGNORE] * 3 + [8], 0)
    for examples in ([long, short], [short, short], [short, long, long]):
        for cost in (FREE, BY_ROWS):
            loss = batch_loss(model, make_batch(examples, cost), LabelledCrossEntropy())
            torch.testing.assert_close(loss, plain_loss(model, examples))


def test_learning_the_input_too(model):
    tokens = [5, 6, 7, 8, 9]
    examples = [Example(tokens, [IGNORE, *tokens[1:]], 0), Example([5, 6, 1, 2, 3, 4], [IGNORE, 6, 1, 2, 3, 4], 0)]
    assert common_prefix(examples) == 0  # the first token already predicts a target token
    for share in (True, False):
        loss = batch_loss(model, make_batch(examples, FREE, share), LabelledCrossEntropy())
        torch.testing.assert_close(loss, plain_loss(model, examples))


def test_loss_in_chunks_has_the_same_value_and_gradients(model):
    examples = rows(3, 8, 5)
    whole = batch_loss(model, make_batch(examples, FREE), LabelledCrossEntropy())
    chunked = batch_loss(model, make_batch(examples, FREE), LabelledCrossEntropy(num_output_chunks=4, rows_per_chunk=3))
    torch.testing.assert_close(whole, chunked)
    for a, b in zip(gradients(model, whole), gradients(model, chunked), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_cheaper_layout_is_chosen(model):
    cost = attention_cost(model)
    alike = rows(1, 8, prefix=60, longest=4)
    assert make_batch(alike, cost).tokens.shape[0] == 1
    unlike = [Example([r, *range(3, 200)], [IGNORE] * 197 + [199], 0) for r in range(3, 11)]
    assert make_batch(unlike, cost).tokens.shape[0] == 8, "nothing shared and long rows: a pack only adds attention"
    assert make_batch(alike, cost, share_prefix=False).tokens.shape[0] == 8


def test_validation_loss_is_the_mean_over_labelled_tokens_of_every_row(model):
    examples = rows(11, 75, prefix=9)  # more than two batches, the last one smaller
    model.train()

    def forward_only(examples: list[Example]) -> StepOutput:
        with eval_mode(model):
            assert not model.training
            batch = make_batch(examples, attention_cost(model))
            return StepOutput(batch_loss(model, batch, LabelledCrossEntropy()), len(batch.targets), batch.num_tokens)

    total, labels = validation_sums(validation_batches(examples), forward_only)
    assert labels == sum(label != IGNORE for e in examples for label in e.labels)
    assert total == pytest.approx(plain_loss(model, examples).item(), rel=1e-5)
    assert model.training


@pytest.mark.parametrize("group", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_row_stands_in_one_batch(group, shuffle):
    lengths = [random.Random(1).randint(1, 90) for _ in range(203)]
    order = dict(seed=1, epoch=0, shuffle=shuffle, group_by_length=group)
    batches = batch_order(lengths, 8, **order)
    assert sorted(r for b in batches for r in b) == list(range(203))
    assert sorted(map(len, batches)) == [3] + [8] * 25
    assert batches == batch_order(lengths, 8, **order)
    if shuffle:
        assert batches != batch_order(lengths, 8, **(order | {"seed": 2}))
        assert batches != batch_order(lengths, 8, **(order | {"epoch": 1}))
    else:
        assert [r for b in batches for r in b] == list(range(203))


def test_grouping_by_length_saves_pad_tokens():
    draw = random.Random(4)
    lengths = [draw.randint(5, 200) for _ in range(800)]

    def padded(group: bool) -> int:
        batches = batch_order(lengths, 8, seed=1, epoch=0, shuffle=True, group_by_length=group)
        return sum(len(b) * max(lengths[r] for r in b) for b in batches)

    assert padded(True) < 1.1 * sum(lengths) < 1.5 * sum(lengths) < padded(False)
