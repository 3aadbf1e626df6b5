"""How two models of one base differ on the same texts: perplexity, logits, likeliest tokens. How large an adapter is."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from cruijff_kit.models.compat import TransformerDecoder
from cruijff_kit.models.hidden_states import Model, TextBatch, layer_states, next_logits

_SCORED = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class ScoredText:
    """A text, and which of its tokens are scored."""

    ids: list[int]
    """Its tokens."""
    scored_from: int
    """Index of the first token that is scored."""
    at: int
    """Position behind which next tokens are compared."""


@dataclass
class ModelDifference:
    """Differences between two models on some texts."""

    texts: int = 0
    """Number of texts."""
    scored: int = 0
    """Number of scored tokens."""
    nll: tuple[float, float] = (0.0, 0.0)
    """Mean negative log-likelihood of the scored tokens, in nats, of each model; perplexity is its exponential."""
    mean_abs: float = 0.0
    """Of the difference between logits, over texts and vocabulary."""
    max_abs: float = 0.0
    """Likewise."""
    kl: float = 0.0
    """Mean KL(second || first) of the next token, in nats."""
    agree: float = 0.0
    """Share of texts with the same likeliest next token."""

    @property
    def perplexity(self) -> tuple[float | None, float | None]:
        """Of the scored tokens, by each model; None where none was scored, or beyond all numbers."""
        one, other = (math.exp(n) if n < 700 else None for n in self.nll)  # NaN is not below
        return one, other


@torch.inference_mode()
def measure_difference(
    first: Model,
    second: Model,
    rows: list[ScoredText],
    pad_id: int,
    batch_size: int = 16,
    advance: Callable[[int], object] = lambda texts: None,
) -> ModelDifference:
    """Compare two models, which may be one with its adapters on and off.

    Args:
        advance: called after each batch with its number of texts.
    """
    found, sums = ModelDifference(len(rows), sum(len(r.ids) - r.scored_from for r in rows)), [0.0, 0.0]
    rows = sorted(rows, key=lambda r: -len(r.ids))
    for begin in range(0, len(rows), batch_size):
        chosen = rows[begin : begin + batch_size]
        logits = []
        for n, model in enumerate((first, second)):
            batch = TextBatch.of([r.ids for r in chosen], pad_id, len(chosen[0].ids), model.machine.device)
            (states,) = dict(layer_states(model, batch, {len(model.decoder.layers)})).values()
            sums[n] += _nll(model, states, chosen)
            at = torch.tensor([r.at for r in chosen], device=states.device)
            logits.append(next_logits(model, states[torch.arange(len(chosen), device=states.device), at]).cpu())
        _note(found, *logits)
        advance(len(chosen))
    one, other = (s / found.scored if found.scored else math.nan for s in sums)
    found.nll = one, other
    for name in ("mean_abs", "kl", "agree"):
        setattr(found, name, getattr(found, name) / len(rows))
    return found


def _note(found: ModelDifference, first: torch.Tensor, second: torch.Tensor) -> None:
    """Add the sums over texts of [n, vocabulary] logits."""
    apart = (second - first).abs()
    found.mean_abs += apart.mean(-1).sum().item()
    found.max_abs = max(found.max_abs, apart.max().item())
    p, q = second.double().log_softmax(-1), first.double().log_softmax(-1)
    found.kl += (p.exp() * (p - q)).sum().item()
    found.agree += (first.argmax(-1) == second.argmax(-1)).sum().item()


def _nll(model: Model, states: torch.Tensor, rows: list[ScoredText]) -> float:
    """Summed negative log-likelihood of the scored tokens; states [b, s, width]."""
    at = [(n, i - 1) for n, r in enumerate(rows) for i in range(r.scored_from, len(r.ids))]
    targets = torch.tensor([t for r in rows for t in r.ids[r.scored_from :]], device=states.device)
    total = 0.0
    for begin in range(0, len(at), _SCORED):
        text, position = torch.tensor(at[begin : begin + _SCORED], device=states.device).T
        logits = next_logits(model, states[text, position])
        total += torch.nn.functional.cross_entropy(logits, targets[begin : begin + _SCORED], reduction="sum").item()
    return total


@dataclass(frozen=True)
class AdapterSize:
    """How much an adapter changes the base model."""

    norm: float
    """Frobenius norm of all updates (alpha / rank) B A together."""
    modules: int
    """Number of modules with an adapter."""
    nonzero: int
    """Number of those whose B is not all zero."""


@torch.inference_mode()
def measure_adapter(model: TransformerDecoder) -> AdapterSize:
    """How large a model's adapter is, worked out without the updates: |BA|^2 = sum of (B'B) * (AA')."""
    squares, nonzero = [], 0
    for module in model.modules():
        if hasattr(module, "adapter_params") and hasattr(module, "lora_a"):
            a, b = module.lora_a.weight.double(), module.lora_b.weight.double()
            scale = module.alpha / module.rank
            squares.append(scale**2 * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).item())
            nonzero += bool(b.any())
    return AdapterSize(math.sqrt(math.fsum(squares)), len(squares), nonzero)
