"""Sample the next token of each row by the row's own settings; what is reported is the model's own distribution.

A token is drawn with one random number of the row's own, laid along the probabilities in the order of the vocabulary, so
it depends on the row alone.
"""

import random
from collections import Counter
from typing import Any

import torch

from cruijff_kit.evaluation.engine.request import Completion, CompletionRequest, Sampling, TokenLogprob

_AT_ONCE = 1 << 20  # log-probabilities; on a CPU a table of all would cost more in fresh memory than in arithmetic
_CANDIDATES = 1024  # likeliest tokens among which top_p mostly ends; sorting a whole vocabulary takes longer


def sample_next_tokens(
    logits: torch.Tensor,
    requests: list[CompletionRequest],
    completions: list[Completion],
    rngs: list[random.Random],
) -> list[TokenLogprob]:
    """Sample one token for each row.

    Args:
        logits: [rows, vocabulary], fp32.
        requests, completions, rngs: of each row: its settings, its tokens so far, and its random numbers.
    """
    sampled = _choose(logits, [r.sampling for r in requests], completions, rngs)
    num_alternatives = min(max(r.top_logprobs for r in requests), logits.shape[1])
    sampled_logprobs, ids, values = [], [], []
    rows = max(1, _AT_ONCE // logits.shape[1])
    for part, tokens in zip(logits.split(rows), sampled.split(rows), strict=True):
        logprobs = part.log_softmax(-1)
        likeliest = logprobs.topk(num_alternatives, -1)
        sampled_logprobs.append(logprobs.gather(1, tokens[:, None])[:, 0])
        ids.append(likeliest.indices)
        values.append(likeliest.values)
    columns = (x.tolist() for x in (sampled, torch.cat(sampled_logprobs), torch.cat(ids), torch.cat(values)))
    return [
        TokenLogprob(token, logprob, list(zip(*top, strict=True))[: request.top_logprobs])
        for token, logprob, *top, request in zip(*columns, requests, strict=True)
    ]


def _choose(
    logits: torch.Tensor, settings: list[Sampling], completions: list[Completion], rngs: list[random.Random]
) -> torch.Tensor:
    adjusted = [row for row, s in enumerate(settings) if s.changes_logits]
    if adjusted:
        logits = logits.clone()
        for row in adjusted:
            _adjust(logits[row], settings[row], completions[row])
    tokens = logits.argmax(-1)
    sampled_rows = [row for row, s in enumerate(settings) if s.temperature]
    if sampled_rows:
        at = torch.tensor(sampled_rows, device=logits.device)
        numbers = torch.tensor([rngs[row].random() for row in sampled_rows], dtype=torch.float64)
        tokens[at] = _draw(
            logits[at], [settings[row] for row in sampled_rows], numbers.to(**_wide_dtype(logits.device))
        )
    return tokens


def _adjust(logits: torch.Tensor, settings: Sampling, completion: Completion) -> None:
    """Apply penalties and bias, in place, to one row [vocabulary]."""
    change: Any = Counter(settings.bias)  # of fractions
    for token, times in Counter(completion.ids).items():
        change[token] -= times * settings.frequency_penalty + settings.presence_penalty
    if change:
        at = torch.tensor(list(change), device=logits.device)
        logits[at] += torch.tensor(list(change.values()), device=logits.device, dtype=logits.dtype)


def _draw(logits: torch.Tensor, settings: list[Sampling], numbers: torch.Tensor) -> torch.Tensor:
    """Draw a token of each row [rows, vocabulary]: the one where its number in [0, 1) falls."""
    scores = logits / torch.tensor([[s.temperature] for s in settings], device=logits.device)
    if any(s.top_k or s.top_p is not None for s in settings):
        scores = scores.masked_fill(scores < _lowest_score(scores, settings), float("-inf"))
    along = scores.to(numbers.dtype).softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(along, (numbers * along[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[1] - 1)


def _lowest_score(scores: torch.Tensor, settings: list[Sampling]) -> torch.Tensor:
    """Return the lowest score [rows, 1] that top_k and top_p keep in each row."""
    vocabulary = scores.shape[1]
    k = torch.tensor([[min(s.top_k or vocabulary, vocabulary)] for s in settings], device=scores.device)
    p = torch.tensor([[1.0 if s.top_p is None else s.top_p] for s in settings], device=scores.device)
    counts = [min(s.top_k or (_CANDIDATES if s.top_p is not None else 1), vocabulary) for s in settings]
    ordered, mass = _top_scores(scores, max(counts), k)
    reached = (mass[:, -1:] >= p) | (k <= ordered.shape[1]) | (p >= 1)
    if not reached.all():
        ordered, mass = _top_scores(scores, vocabulary, k)
    kth = ordered.gather(1, k.clamp(max=ordered.shape[1]) - 1)
    mass_before = torch.cat([torch.zeros_like(p), mass[:, :-1]], 1)
    inside = (mass_before < p) & (ordered >= kth)
    inside[:, 0] = True
    least = ordered.masked_fill(~inside, float("inf")).amin(-1, keepdim=True)
    return least.masked_fill((k == vocabulary) & (p >= 1), float("-inf"))


def _top_scores(scores: torch.Tensor, count: int, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` highest scores [rows, count], and their summed probability among each row's k likeliest."""
    ordered = scores.topk(min(count, scores.shape[1]), -1).values
    among_all = scores.logsumexp(-1, keepdim=True)
    limited = ordered.masked_fill(torch.arange(ordered.shape[1], device=scores.device) >= k, float("-inf"))
    among_k = torch.where(k < scores.shape[1], limited.logsumexp(-1, keepdim=True), among_all)
    return ordered, (limited - among_k).exp().cumsum(-1)


def _wide_dtype(device: torch.device) -> dict:
    # MPS has no fp64; there are 2^24 steps between 0 and 1 then, enough for a vocabulary.
    return {"device": device, "dtype": torch.float32 if device.type == "mps" else torch.float64}
