"""Examples as tensors: which rows share a batch, and how a batch is laid out without waste.

Two layouts give the same losses:

padded   [rows, longest]. Right-padded; causality keeps the pad tokens from mattering.
shared   [1, prefix + all the rest]. The tokens that all rows begin with stand once, each row's own follow; a row sees the
         prefix and itself, and its positions continue the prefix's. No pad tokens, the prefix computed once.
         Attention goes over everything, with a mask, or (where calls are cheap) row by row, without one.
         Rows that are packed (`packing`) stand so pack by pack: [packs, longest pack].

The cheapest is taken. In each, a row's last token is left out: nothing is predicted from it.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cruijff_kit.data.examples import IGNORE, Example
from cruijff_kit.data.packing import Pack, rows_of

_PREFIX, _PAD = -1, -2  # whose a token is: all rows' of its pack, or nobody's
_CHUNK = 50  # batches among which rows are sorted by length: enough to find like rows, few enough to stay random


@dataclass(frozen=True)
class AttentionCost:
    """What attention costs, in units of one token through the linear layers.

    pair: of one query and one key. call: of each call beside its pairs, as pairs; None: attention cannot go row by row.
    """

    pair: float
    call: float | None = None


@dataclass(frozen=True)
class Spans:
    """In place of a mask: the first `prefix` tokens are shared, then follow `own` tokens of each row."""

    prefix: int
    own: tuple[int, ...]

    @property
    def pairs(self) -> int:
        """Queries times keys, row by row."""
        return self.prefix**2 + sum(n * (self.prefix + n) for n in self.own)


@dataclass
class Batch:
    """Rows ready for the model.

    tokens: [b, s] ids. positions: [b, s] or None for 0..s-1. mask: [b, s, s], True where attention is allowed; None for
    causal; Spans for attention row by row (`training.cpu`). predicting: [n] indices into the flattened [b * s] of
    the positions that predict a learnt token. targets: [n] those tokens. num_tokens: of the rows, as if each stood alone.
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None
    mask: torch.Tensor | Spans | None
    predicting: torch.Tensor
    targets: torch.Tensor
    num_tokens: int

    def to(self, device: torch.device) -> "Batch":
        """The same batch on a device."""
        moved = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return Batch(**{**vars(self), **moved})


def batch_order(
    lengths: list[int], batch_size: int, *, seed: int, epoch: int, shuffle: bool, group_by_length: bool
) -> list[list[int]]:
    """The rows of each batch of an epoch; every row once, the last batch may be smaller.

    Args:
        lengths: tokens of each row.
        batch_size: rows per batch.
        seed, epoch: what the order is drawn from.
        shuffle: False keeps the file's order.
        group_by_length: after shuffling, sort stretches of 50 batches by length and draw the batches' order again.
    """
    rows = list(range(len(lengths)))
    if not shuffle:
        return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    draw = random.Random(f"{seed} {epoch}")
    draw.shuffle(rows)
    if group_by_length:
        stretch = _CHUNK * batch_size
        rows = [r for i in range(0, len(rows), stretch) for r in sorted(rows[i : i + stretch], key=lengths.__getitem__)]
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    if group_by_length:
        draw.shuffle(batches)
    return batches


def make_batch(examples: Sequence[Example | Pack], attention_cost: AttentionCost, share_prefix: bool = True) -> Batch:
    """Lay out a batch in the cheapest way.

    Args:
        examples: the rows, or packs of rows; where attention goes row by row, what is packed with what does not matter.
        attention_cost: of the model on its device.
        share_prefix: False forces the padded layout (needed where rows must differ on the prefix, as with dropout).
    """
    packs = [rows_of(e) for e in examples]
    rows = tuple(row for pack in packs for row in pack)
    if len(rows) > len(packs) and attention_cost.call is None:
        return _laid_out(packs, share_prefix)
    prefix = common_prefix(rows)
    spans = Spans(prefix, tuple(len(e.tokens) - 1 - prefix for e in rows))
    together, longest, pair = prefix + sum(spans.own), prefix + max(spans.own), attention_cost.pair
    padded = len(rows) * (longest + pair * longest**2)
    masked = together + pair * together**2
    by_rows = math.inf
    if attention_cost.call is not None:
        by_rows = together + pair * (spans.pairs + attention_cost.call * len(rows))
    if not share_prefix or len(rows) == 1 or padded <= min(masked, by_rows):
        return _padded(rows, longest)
    return _laid_out([rows], share_prefix, spans if by_rows < masked else None)


def common_prefix(examples: Sequence[Example]) -> int:
    """How many tokens all rows begin with, short of the token that predicts the first learnt one."""
    first = examples[0].tokens
    limit = min(e.first_label - 1 for e in examples)
    for i in range(limit):
        if any(e.tokens[i] != first[i] for e in examples):
            return i
    return limit


def _padded(examples: Sequence[Example], longest: int) -> Batch:
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    predicting, targets = [], []
    for r, e in enumerate(examples):
        tokens[r, : len(e.tokens) - 1] = torch.tensor(e.tokens[:-1])
        for i in range(1, len(e.labels)):
            if e.labels[i] != IGNORE:
                predicting.append(r * longest + i - 1)
                targets.append(e.labels[i])
    return _batch(tokens, None, None, predicting, targets, examples)


def _batch(tokens, positions, mask, predicting, targets, examples) -> Batch:
    return Batch(
        tokens, positions, mask, torch.tensor(predicting), torch.tensor(targets), sum(len(e.tokens) for e in examples)
    )


def _laid_out(packs: list[tuple[Example, ...]], share_prefix: bool, spans: Spans | None = None) -> Batch:
    """[packs, longest]: the shared layout, for each pack of rows; with `spans` in place of a mask, for a single one."""
    laid = [_lay(rows, common_prefix(rows) if share_prefix and len(rows) > 1 else 0) for rows in packs]
    longest = max(len(one.tokens) for one in laid)
    tokens, positions = (torch.zeros(len(packs), longest, dtype=torch.long) for _ in range(2))
    whose = torch.full((len(packs), longest), _PAD)
    predicting, targets = [], []
    for p, one in enumerate(laid):
        end = len(one.tokens)
        tokens[p, :end], positions[p, :end] = torch.tensor(one.tokens), torch.tensor(one.positions)
        whose[p, :end] = torch.tensor(one.whose)
        predicting += [p * longest + i for i in one.predicting]
        targets += one.targets
    rows = [e for pack in packs for e in pack]
    return _batch(tokens, positions, _mask(whose) if spans is None else spans, predicting, targets, rows)


def _mask(whose: torch.Tensor) -> torch.Tensor:
    # Pad tokens see each other: a token that saw nothing would have no attention to share out.
    return ((whose[:, :, None] == whose[:, None, :]) | (whose[:, None, :] == _PREFIX)).tril()


@dataclass
class _Laid:
    """A pack's tokens, their positions and whose they are; which of them predict, and what."""

    tokens: list[int]
    positions: list[int]
    whose: list[int]
    predicting: list[int]
    targets: list[int]


def _lay(rows: tuple[Example, ...], prefix: int) -> _Laid:
    laid = _Laid(list(rows[0].tokens[:prefix]), list(range(prefix)), [_PREFIX] * prefix, [], [])
    for number, e in enumerate(rows):
        shift = len(laid.tokens) - prefix
        learnt = [i for i in range(max(1, e.first_label), len(e.labels)) if e.labels[i] != IGNORE]
        laid.predicting += [shift + i - 1 for i in learnt]
        laid.targets += [e.labels[i] for i in learnt]
        laid.tokens += e.tokens[prefix:-1]
        laid.positions += range(prefix, len(e.tokens) - 1)
        laid.whose += [number] * (len(e.tokens) - 1 - prefix)
    return laid
