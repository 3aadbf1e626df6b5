"""What a model makes of texts: the states of its layers, pooled over positions, and the logits behind the last one.

Texts stand on the left, pads behind them, and no text's position looks at a pad. Layers are counted as transformers counts
`output_hidden_states`: 0 is the embedding, N what the Nth block gives, the last one behind the final norm.

mean, median, last     over all positions, pads too (median: of an even number the lower of the two in the middle). Every
                       text is padded to the longest of all texts, so batches make no difference, but other texts can
first                  the first position
mean_non_padding, last_non_padding    of the text's own positions
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
from cruijff_kit.models.pooling import EACH

OVER_PADS = ("mean", "median", "last")


@dataclass
class Model:
    """A model whose states are read."""

    decoder: TransformerDecoder
    machine: Machine
    base: bool
    """Whether its adapters are switched off."""

    def own(self) -> AbstractContextManager:
        """Within this context it is the base model, if that is what it is to be."""
        return disable_adapter(self.decoder) if self.base else nullcontext()


def open_model(cfg: dict[str, Any], adapter: Path | None, ours: bool = True) -> Model:
    """A model with an adapter, or the base alone, where it can compute. dtype=auto is fp32 on a CPU.

    Args:
        cfg: torchtune config of the model.
        adapter: its folder; None: none.
        ours: whether `models.adapter` saved it.
    Raises:
        UserError: files that are missing or do not fit; a device that is not there.
    """
    on_cpu = cfg["device"] == "cpu" or (cfg["device"] == "auto" and not torch.cuda.is_available())
    dtype = "fp32" if cfg["dtype"] == "auto" and on_cpu else cfg["dtype"]
    decoder, machine = place_for_evaluation(cfg | {"dtype": dtype})
    decoder.eval()
    if adapter is not None:
        (adapters.load_adapter if ours else load_peft_adapter)(decoder, adapter)
    return Model(decoder, machine, base=adapter is None)


@dataclass
class States:
    """Hidden states and logits of n texts, in their order, in fp32."""

    tensor: np.ndarray
    """[n, layers, width]; without pooling [n, layers, positions, width], zeros at pads."""
    attention_mask: np.ndarray
    """[n, positions], 1 at tokens of a text."""
    logits: np.ndarray | None = None
    """[n, vocabulary] behind the last token of each text."""
    top: list[list[tuple[int, float]]] | None = None
    """Of each text the likeliest next tokens, (id, probability)."""


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
    """The states of texts.

    Args:
        rows: ids of each text, at least one.
        layers: from 0 (the embedding) to the number of blocks.
        pooling: one of POOLINGS, or EACH.
        top: so many likeliest next tokens.
        advance: called after each batch with its number of texts.
    """
    width, longest = model.decoder.tok_embeddings.embedding_dim, max(map(len, rows))
    shape = (len(rows), len(layers), *([longest] if pooling == EACH else []), width)
    states_read = States(np.zeros(shape, np.float32), np.zeros((len(rows), longest), np.int8))
    states_read.logits = (
        np.zeros((len(rows), model.decoder.tok_embeddings.num_embeddings), np.float32) if logits else None
    )
    states_read.top = [[] for _ in rows] if top else None
    order = sorted(range(len(rows)), key=lambda n: -len(rows[n]))  # texts of like length share a batch
    last, asked = len(model.decoder.layers), logits or top > 0
    for begin in range(0, len(order), batch_size):
        chosen = order[begin : begin + batch_size]
        to = longest if pooling in OVER_PADS else len(rows[chosen[0]])
        batch = TextBatch.of([rows[n] for n in chosen], pad_id, to, model.machine.device)
        states = dict(
            layer_states(model, batch, {*layers, last} if asked else {*layers}, see_pads=pooling in OVER_PADS)
        )
        _note_states(states_read, chosen, [states[n] for n in layers], batch, pooling)
        if asked:
            _note_next(states_read, chosen, next_logits(model, batch.last(states[last])), top)
        advance(len(chosen))
    return states_read


def _note_states(
    states_read: States, chosen: list[int], states: list[torch.Tensor], batch: "TextBatch", pooling: str
) -> None:
    to = batch.ids.shape[1]
    for place, layer in enumerate(states):
        pooled = pool(layer.float(), batch.mask, pooling).cpu().numpy()
        if pooling == EACH:
            states_read.tensor[chosen, place, :to] = pooled
        else:
            states_read.tensor[chosen, place] = pooled
    states_read.attention_mask[chosen, :to] = batch.mask.cpu().numpy()


def _note_next(states_read: States, chosen: list[int], logits: torch.Tensor, top: int) -> None:
    if states_read.logits is not None:
        states_read.logits[chosen] = logits.cpu().numpy()
    if top:
        likeliest = logits.softmax(-1).topk(min(top, logits.shape[-1]), -1)
        for n, ids, shares in zip(chosen, likeliest.indices.tolist(), likeliest.values.tolist(), strict=True):
            states_read.top[n] = list(zip(ids, shares, strict=True))


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
    def of(rows: list[list[int]], pad_id: int, to: int, device: torch.device) -> "TextBatch":
        """Rows padded to a length."""
        lengths = torch.tensor([len(r) for r in rows], device=device)
        ids = torch.tensor([[*r, *[pad_id] * (to - len(r))] for r in rows], device=device)
        return TextBatch(ids, torch.arange(to, device=device) < lengths[:, None], lengths)

    def last(self, states: torch.Tensor) -> torch.Tensor:
        """[b, s, ...] -> [b, ...] at each text's last position."""
        return states[torch.arange(len(states), device=states.device), self.lengths.to(states.device) - 1]


def layer_states(
    model: Model, batch: TextBatch, wanted: set[int], see_pads: bool = False
) -> Iterator[tuple[int, torch.Tensor]]:
    """Number and states [b, s, width] of the layers that are wanted.

    Args:
        see_pads: pads' own states matter: they see the text and no other pad, as under transformers' attention mask. Where
            they do not, nothing has to be masked, because they stand behind the text.
    """
    decoder, s = model.decoder, batch.ids.shape[1]
    seen = None
    if see_pads and not batch.mask.all():
        causal = torch.ones(s, s, dtype=torch.bool, device=batch.ids.device).tril()
        seen = causal & batch.mask[:, None, :]
    positions = torch.arange(s, device=batch.ids.device)[None]
    with model.own():
        h = decoder.tok_embeddings(batch.ids)
        if 0 in wanted:
            yield 0, h
        for number, layer in enumerate(decoder.layers, 1):
            h = layer(h, mask=seen, input_pos=positions)
            if number in wanted and number < len(decoder.layers):
                yield number, h
        if len(decoder.layers) in wanted:
            yield len(decoder.layers), decoder.norm(h)


def next_logits(model: Model, states: torch.Tensor) -> torch.Tensor:
    """[n, width] states behind the final norm -> [n, vocabulary] in fp32."""
    with model.own():
        return model.decoder.output(states).float()


def pool(states: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """[b, s, width] -> [b, width]; without pooling [b, s, width] with zeros at pads."""
    own = mask.to(states.device)[..., None]
    if pooling == EACH:
        return states * own
    if pooling == "mean":
        return states.mean(1)
    if pooling == "median":
        return states.median(1).values
    if pooling == "mean_non_padding":
        return (states * own).sum(1) / own.sum(1)
    if pooling == "last_non_padding":
        return states[torch.arange(len(states), device=states.device), own.sum(1)[:, 0] - 1]
    return states[:, 0 if pooling == "first" else -1]
