"""Hidden states and logits: those of transformers and peft, whatever else is in the batch."""

import numpy as np
import pytest
import torch

import cruijff_kit
from cruijff_kit.models.adapter import save_adapter
from cruijff_kit.models.compat import get_adapter_params
from cruijff_kit.models.hidden_states import open_model, read_states
from cruijff_kit.models.pooling import POOLINGS

TEXTS = [
    "One.",
    "A longer text, of some more letters.",
    "?",
    "Two words",
    "The last one; it is the longest of them all!",
]


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    """An adapter with large values on every projection, as ours are saved, and the torchtune config it is for."""
    settings = ["lora.rank=4", "lora.attn_modules=[q_proj,k_proj,v_proj,output_proj]", "device=cpu", "dtype=fp32"]
    cfg = cruijff_kit.compose(["model=hf_llama", f"model.path={tiny}", *settings]).torchtune
    model = open_model(cfg, None)
    draw = torch.Generator().manual_seed(3)
    for p in get_adapter_params(model.decoder).values():
        p.data = torch.randn(p.shape, generator=draw) * 0.03
    folder = tmp_path_factory.mktemp("adapter") / "epoch_0"
    save_adapter(model.decoder, cfg["model"], str(tiny), folder)
    return cfg, folder


@pytest.fixture(scope="module")
def rows(tiny) -> list[list[int]]:
    from transformers import AutoTokenizer

    return [AutoTokenizer.from_pretrained(tiny)(t)["input_ids"] for t in TEXTS]


def states_of(adapter, rows, place, pooling="last_non_padding", **more):
    return read_states(open_model(adapter[0], place), rows, [*range(5)], pooling, pad_id=0, **more)


@pytest.fixture(scope="module", params=["base", "adapter"])
def expected(request, tiny, adapter, rows):
    """transformers' states [n, layers, positions, width], logits [n, positions, vocabulary] and mask of padded texts."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    place = adapter[1] if request.param == "adapter" else None
    model = PeftModel.from_pretrained(model, place).eval() if place else model.eval()
    longest = max(map(len, rows))
    ids = torch.tensor([[*r, *[0] * (longest - len(r))] for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (longest - len(r)) for r in rows])
    with torch.inference_mode():
        out = model(ids, attention_mask=mask, output_hidden_states=True)
    return place, torch.stack(out.hidden_states, 1), out.logits, mask


def pooled(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """[n, layers, positions, width] -> [n, layers, width], one text at a time."""
    found = []
    for h, own in zip(states, mask.sum(1).tolist(), strict=True):
        found.append({
            "mean": h.mean(1), "median": h.median(1).values, "first": h[:, 0], "last": h[:, -1],
            "mean_non_padding": h[:, :own].mean(1), "last_non_padding": h[:, own - 1],
        }[pooling])  # fmt: skip
    return torch.stack(found)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_each_layer_is_that_of_transformers(expected, adapter, rows, pooling):
    place, states, logits, mask = expected
    ours = states_of(adapter, rows, place, pooling, batch_size=2, logits=True, top=3)
    np.testing.assert_allclose(ours.tensor, pooled(states, mask, pooling), rtol=0, atol=1e-4)
    assert (ours.attention_mask == mask.numpy()).all()
    behind = logits[torch.arange(len(rows)), mask.sum(1) - 1]
    np.testing.assert_allclose(ours.logits, behind, rtol=0, atol=1e-4)
    likeliest = behind.softmax(-1).topk(3, -1)
    assert [[n for n, _ in row] for row in ours.top] == likeliest.indices.tolist()
    np.testing.assert_allclose([[p for _, p in row] for row in ours.top], likeliest.values, rtol=0, atol=1e-4)


def test_every_position_without_pooling(expected, adapter, rows):
    place, states, _, mask = expected
    ours = states_of(adapter, rows, place, "none", batch_size=3)
    np.testing.assert_allclose(ours.tensor, states * mask[:, None, :, None], rtol=0, atol=1e-4)


@pytest.mark.parametrize("pooling", ["first", "mean_non_padding", "last_non_padding"])
def test_a_text_is_the_same_alone_and_in_a_batch(adapter, rows, pooling):
    together = states_of(adapter, rows, adapter[1], pooling, batch_size=5, logits=True)
    for n, row in enumerate(rows):
        alone = states_of(adapter, [row], adapter[1], pooling, logits=True)
        np.testing.assert_allclose(alone.tensor[0], together.tensor[n], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(alone.logits[0], together.logits[n], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "median", "last", "none"])
def test_the_size_of_batches_makes_no_difference(adapter, rows, pooling):
    one, all_ = (states_of(adapter, rows, adapter[1], pooling, batch_size=n) for n in (1, 5))
    np.testing.assert_allclose(one.tensor, all_.tensor, rtol=1e-5, atol=1e-5)
