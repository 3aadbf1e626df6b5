"""Read the hidden states of texts, pooled over positions, and the logits of the next token.

Texts are padded on the right, and no token attends to a pad. Layers are numbered as in transformers'
`output_hidden_states`: 0 is the embedding, N the output of the Nth block, and the last one follows the final norm.

Poolings:
    mean, median, last: over all positions, pads included (median: the lower of the two middle values of an even number).
        Every text is padded to the longest of all texts, so the result does not depend on the batches, but it depends on
        the other texts.
    first: the first position.
    mean_non_padding, last_non_padding: over the text's own positions.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cruijff_kit.models import adapter as adapters
from cruijff_kit.models.compat import TransformerDecoder, disable_adapter
from cruijff_kit.models.device import Machine
from cruijff_kit.models.external_adapter import load_peft_adapter
from cruijff_kit.models.placement import place_for_evaluation
from cruijff_kit.models.pooling import NO_POOLING

POOLINGS_WITH_PADS = ("mean", "median", "last")


@dataclass
class Model:
    """A model whose states are read."""

    decoder: TransformerDecoder
    machine: Machine
    is_base: bool
    """Whether its adapters are switched off."""

    def adapter_context(self) -> AbstractContextManager:
        """Return a context in which the adapters are off, if this is the base model."""
        return disable_adapter(self.decoder) if self.is_base else nullcontext()


def open_model(cfg: dict[str, Any], adapter: Path | None, is_peft: bool = False) -> Model:
    """Load the base model, with an adapter or without, on the device that evaluates it. dtype=auto is fp32 on a CPU.

    Args:
        cfg: torchtune config of the model.
        adapter: the adapter's folder; None for the base model alone.
        is_peft: whether PEFT saved the adapter, not `models.adapter`.
    Raises:
        UserError: a file is missing or does not fit, or the device does not exist.
    """
    on_cpu = cfg["device"] == "cpu" or (cfg["device"] == "auto" and not torch.cuda.is_available())
    dtype = "fp32" if cfg["dtype"] == "auto" and on_cpu else cfg["dtype"]
    decoder, machine = place_for_evaluation(cfg | {"dtype": dtype})
    decoder.eval()
    if adapter is not None:
        (load_peft_adapter if is_peft else adapters.load_adapter)(decoder, adapter)
    return Model(decoder, machine, is_base=adapter is None)


@dataclass
class States:
    """Hidden states and logits of n texts, in the order of the texts, in fp32."""

    tensor: np.ndarray
    """[n, layers, width]; without pooling [n, layers, positions, width], zeros at pads."""
    attention_mask: np.ndarray
    """[n, positions], 1 at tokens of a text."""
    logits: np.ndarray | None = None
    """[n, vocab_size], of the token after each text."""
    top: list[list[tuple[int, float]]] | None = None
    """The likeliest next tokens of each text, (id, probability)."""


@torch.inference_mode()
def read_states(
    model: Model,
    rows: list[list[int]],
    layers: list[int],
    pooling: str,
    *,
    pad_id: int,
    batch_size: int = 16,
    logits: bool = False,
    top: int = 0,
    advance: Callable[[int], object] = lambda texts: None,
) -> States:
    """Read the states of texts.

    Args:
        model: from `open_model`.
        rows: ids of each text, at least one id each.
        layers: layer numbers, from 0 (the embedding) to the number of blocks.
        pooling: one of POOLINGS, or NO_POOLING.
        pad_id: id of the pad token.
        batch_size: texts per forward pass.
        logits: also return the logits of the next token.
        top: number of likeliest next tokens to return.
        advance: called after each batch with its number of texts.
    """
    width, longest = model.decoder.tok_embeddings.embedding_dim, max(map(len, rows))
    shape = (len(rows), len(layers), *([longest] if pooling == NO_POOLING else []), width)
    states = States(np.zeros(shape, np.float32), np.zeros((len(rows), longest), np.int8))
    states.logits = np.zeros((len(rows), model.decoder.tok_embeddings.num_embeddings), np.float32) if logits else None
    states.top = [[] for _ in rows] if top else None
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))  # texts of similar length share a batch
    last_layer, needs_logits, keeps_pads = len(model.decoder.layers), logits or top > 0, pooling in POOLINGS_WITH_PADS
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        length = longest if keeps_pads else len(rows[indices[0]])
        batch = TextBatch.pad([rows[n] for n in indices], pad_id, length, model.machine.device)
        numbers = {*layers, last_layer} if needs_logits else {*layers}
        layer_outputs = dict(layer_states(model, batch, numbers, needs_pad_states=keeps_pads))
        _store_states(states, indices, [layer_outputs[n] for n in layers], batch, pooling)
        if needs_logits:
            _store_next_tokens(states, indices, next_logits(model, batch.select_last(layer_outputs[last_layer])), top)
        advance(len(indices))
    return states


def _store_states(
    states: States, indices: list[int], layer_outputs: list[torch.Tensor], batch: "TextBatch", pooling: str
) -> None:
    length = batch.ids.shape[1]
    for position, output in enumerate(layer_outputs):
        pooled_states = pool(output.float(), batch.mask, pooling).cpu().numpy()
        if pooling == NO_POOLING:
            states.tensor[indices, position, :length] = pooled_states
        else:
            states.tensor[indices, position] = pooled_states
    states.attention_mask[indices, :length] = batch.mask.cpu().numpy()


def _store_next_tokens(states: States, indices: list[int], logits: torch.Tensor, top: int) -> None:
    if states.logits is not None:
        states.logits[indices] = logits.cpu().numpy()
    if top:
        likeliest = logits.softmax(-1).topk(min(top, logits.shape[-1]), -1)
        for n, ids, probabilities in zip(indices, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
            states.top[n] = list(zip(ids, probabilities, strict=True))


@dataclass
class TextBatch:
    """Texts of a batch, padded on the right."""

    ids: torch.Tensor
    """[b, s]."""
    mask: torch.Tensor
    """[b, s], True at tokens of a text."""
    lengths: torch.Tensor
    """[b]."""

    @staticmethod
    def pad(rows: list[list[int]], pad_id: int, length: int, device: torch.device) -> "TextBatch":
        """Pad rows to a length."""
        lengths = torch.tensor([len(r) for r in rows], device=device)
        ids = torch.tensor([[*r, *[pad_id] * (length - len(r))] for r in rows], device=device)
        return TextBatch(ids, torch.arange(length, device=device) < lengths[:, None], lengths)

    def select_last(self, states: torch.Tensor) -> torch.Tensor:
        """Select each text's last position, [b, s, ...] -> [b, ...]."""
        return states[torch.arange(len(states), device=states.device), self.lengths.to(states.device) - 1]


def layer_states(
    model: Model, batch: TextBatch, numbers: set[int], needs_pad_states: bool = False
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield number and states, [b, s, width], of layers.

    Args:
        model: from `open_model`.
        batch: texts, padded.
        numbers: the layers to yield.
        needs_pad_states: whether pads get the states that transformers' attention mask gives them: a pad attends to the
            text and to no other pad. Without it no mask is needed, because pads follow the text.
    """
    decoder, s = model.decoder, batch.ids.shape[1]
    mask = None
    if needs_pad_states and not batch.mask.all():
        causal = torch.ones(s, s, dtype=torch.bool, device=batch.ids.device).tril()
        mask = causal & batch.mask[:, None, :]
    positions = torch.arange(s, device=batch.ids.device)[None]
    with model.adapter_context():
        h = decoder.tok_embeddings(batch.ids)
        if 0 in numbers:
            yield 0, h
        for number, layer in enumerate(decoder.layers, 1):
            h = layer(h, mask=mask, input_pos=positions)
            if number in numbers and number < len(decoder.layers):
                yield number, h
        if len(decoder.layers) in numbers:
            yield len(decoder.layers), decoder.norm(h)


def next_logits(model: Model, states: torch.Tensor) -> torch.Tensor:
    """Compute logits from states after the final norm, [n, width] -> [n, vocab_size], in fp32."""
    with model.adapter_context():
        return model.decoder.output(states).float()


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Pool states over positions.

    Args:
        states: [b, s, width].
        mask: [b, s], True at tokens of a text.
        pooling: one of POOLINGS, or NO_POOLING.
    Returns:
        [b, width]; without pooling [b, s, width] with zeros at pads.
    """
    is_text = mask.to(states.device)[..., None]
    if pooling == NO_POOLING:
        return states * is_text
    if pooling == "mean":
        return states.mean(1)
    if pooling == "median":
        return states.median(1).values
    if pooling == "mean_non_padding":
        return (states * is_text).sum(1) / is_text.sum(1)
    if pooling == "last_non_padding":
        return states[torch.arange(len(states), device=states.device), is_text.sum(1)[:, 0] - 1]
    return states[:, 0 if pooling == "first" else -1]
