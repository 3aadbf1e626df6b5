"""Measure how two models of one base differ on texts (perplexity, logits, likeliest tokens), and an adapter's size."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cruijff_kit.models.compat import TransformerDecoder
from cruijff_kit.models.hidden_states import Model, TextBatch, layer_states, next_logits

_MAX_POSITIONS = 256  # positions whose logits are in memory at once


@dataclass(frozen=True)
class ScoredText:
    """A text, and which of its tokens are scored."""

    ids: list[int]
    """Ids of the text."""
    first_scored: int
    """Index of the first token that is scored."""
    position: int
    """Index of the token whose next token is compared."""


@dataclass
class ModelDifference:
    """Differences between two models on some texts."""

    num_texts: int = 0
    """Number of texts."""
    num_scored: int = 0
    """Number of scored tokens."""
    nll: tuple[float, float] = (0.0, 0.0)
    """Mean negative log-likelihood of the scored tokens, in nats, by each model; perplexity is its exponential."""
    mean_abs: float = 0.0
    """Mean absolute difference between the next token's logits, over texts and vocabulary."""
    max_abs: float = 0.0
    """Largest absolute difference between the next token's logits, over texts and vocabulary."""
    kl: float = 0.0
    """Mean KL(second || first) of the next token, in nats."""
    top1_agreement: float = 0.0
    """Share of texts with the same likeliest next token."""

    @property
    def perplexity(self) -> tuple[float | None, float | None]:
        """Return the perplexity of the scored tokens by each model; None without scored tokens, or if it overflows."""
        first, second = (math.exp(n) if n < 700 else None for n in self.nll)  # NaN < 700 is False
        return first, second


@torch.inference_mode()
def measure_difference(
    first: Model,
    second: Model,
    rows: list[ScoredText],
    pad_id: int,
    batch_size: int = 16,
    advance: Callable[[int], object] = lambda texts: None,
) -> ModelDifference:
    """Compare two models on texts.

    Args:
        first, second: models; they may share a decoder, with the adapters off and on.
        rows: the texts.
        pad_id: id of the pad token.
        batch_size: texts per forward pass.
        advance: called after each batch with its number of texts.
    """
    difference, nll_sums = ModelDifference(len(rows), sum(len(r.ids) - r.first_scored for r in rows)), [0.0, 0.0]
    rows = sorted(rows, key=lambda r: -len(r.ids))
    for begin in range(0, len(rows), batch_size):
        texts = rows[begin : begin + batch_size]
        logits = []
        for n, model in enumerate((first, second)):
            batch = TextBatch.pad([r.ids for r in texts], pad_id, len(texts[0].ids), model.machine.device)
            (states,) = dict(layer_states(model, batch, {len(model.decoder.layers)})).values()
            nll_sums[n] += _sum_nll(model, states, texts)
            positions = torch.tensor([r.position for r in texts], device=states.device)
            logits.append(next_logits(model, states[torch.arange(len(texts), device=states.device), positions]).cpu())
        _add_logits(difference, *logits)
        advance(len(texts))
    first_nll, second_nll = (s / difference.num_scored if difference.num_scored else math.nan for s in nll_sums)
    difference.nll = first_nll, second_nll
    for name in ("mean_abs", "kl", "top1_agreement"):
        setattr(difference, name, getattr(difference, name) / len(rows))
    return difference


def _add_logits(difference: ModelDifference, first: torch.Tensor, second: torch.Tensor) -> None:
    """Add the next token's logits, [n, vocab_size], to the sums over texts."""
    distance = (second - first).abs()
    difference.mean_abs += distance.mean(-1).sum().item()
    difference.max_abs = max(difference.max_abs, distance.max().item())
    p, q = second.double().log_softmax(-1), first.double().log_softmax(-1)
    difference.kl += (p.exp() * (p - q)).sum().item()
    difference.top1_agreement += (first.argmax(-1) == second.argmax(-1)).sum().item()


def _sum_nll(model: Model, states: torch.Tensor, rows: list[ScoredText]) -> float:
    """Sum the negative log-likelihood of the scored tokens; states [b, s, width]."""
    positions = [(n, i - 1) for n, r in enumerate(rows) for i in range(r.first_scored, len(r.ids))]
    targets = torch.tensor([t for r in rows for t in r.ids[r.first_scored :]], device=states.device)
    total = 0.0
    for begin in range(0, len(positions), _MAX_POSITIONS):
        end = begin + _MAX_POSITIONS
        text, position = torch.tensor(positions[begin:end], device=states.device).T
        logits = next_logits(model, states[text, position])
        total += torch.nn.functional.cross_entropy(logits, targets[begin:end], reduction="sum").item()
    return total


@dataclass(frozen=True)
class AdapterSize:
    """Size of an adapter's update of the base model."""

    norm: float
    """Frobenius norm of all updates (alpha / rank) B A together."""
    modules: int
    """Number of modules with an adapter."""
    nonzero: int
    """Number of modules whose B is not all zero."""


@torch.inference_mode()
def measure_adapter(model: TransformerDecoder) -> AdapterSize:
    """Measure a model's adapter, without computing the products B A: |BA|^2 = sum of (B'B) * (AA')."""
    squares, nonzero = [], 0
    for module in model.modules():
        if hasattr(module, "adapter_params") and hasattr(module, "lora_a"):
            a, b = module.lora_a.weight.double(), module.lora_b.weight.double()
            scale = module.alpha / module.rank
            squares.append(scale**2 * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).item())
            nonzero += bool(b.any())
    return AdapterSize(math.sqrt(math.fsum(squares)), len(squares), nonzero)
