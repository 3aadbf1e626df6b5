"""Examples as tensors: which rows share a batch, and how a batch is laid out without waste.

Two layouts give the same losses:

padded   [rows, longest]. Right-padded; causality keeps the pad tokens from mattering.
shared   [1, prefix + all the rest]. The tokens that all rows begin with stand once, each row's own follow; a mask lets a
         row see the prefix and itself, and its positions continue the prefix's. No pad tokens, the prefix computed once.

The cheaper one is taken. In both, a row's last token is left out: nothing is predicted from it.
"""

import random
from dataclasses import dataclass

import torch

from cruijff_kit.data.instruct import IGNORE, Example
from cruijff_kit.data.packing import rows_of

_CHUNK = 50  # batches among which rows are sorted by length: enough to find like rows, few enough to stay random


@dataclass
class Batch:
    """Rows ready for the model.

    tokens: [b, s] ids. positions: [b, s] or None for 0..s-1. mask: [b, s, s], True where attention is allowed, or None
    for causal. predicting: [n] indices into the flattened [b * s] of the positions that predict a learnt token.
    targets: [n] those tokens. num_tokens: tokens of the rows, as if each stood alone.
    """

    tokens: torch.Tensor
    positions: torch.Tensor | None
    mask: torch.Tensor | None
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


def make_batch(examples: list[Example], attention_cost: float, share_prefix: bool = True) -> Batch:
    """Lay out a batch in the cheaper way.

    Args:
        examples: the rows.
        attention_cost: cost of one (token, token) pair of attention in units of one token through the linear layers.
        share_prefix: False forces the padded layout (needed where rows must differ on the prefix, as with dropout).
    """
    packs = [rows_of(e) for e in examples]
    if max(map(len, packs)) > 1:
        return _packed(packs, share_prefix)
    examples = [row for (row,) in packs]
    prefix = common_prefix(examples)
    own = [len(e.tokens) - 1 - prefix for e in examples]
    shared, longest = prefix + sum(own), prefix + max(own)
    cost_shared = shared + attention_cost * shared**2
    cost_padded = len(examples) * (longest + attention_cost * longest**2)
    if share_prefix and len(examples) > 1 and cost_shared < cost_padded:
        return _shared(examples, prefix)
    return _padded(examples, longest)


def common_prefix(examples: list[Example]) -> int:
    """How many tokens all rows begin with, short of the token that predicts the first learnt one."""
    first = examples[0].tokens
    limit = min(e.first_label - 1 for e in examples)
    for i in range(limit):
        if any(e.tokens[i] != first[i] for e in examples):
            return i
    return limit


def _padded(examples: list[Example], longest: int) -> Batch:
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    predicting, targets = [], []
    for r, e in enumerate(examples):
        tokens[r, : len(e.tokens) - 1] = torch.tensor(e.tokens[:-1])
        for i in range(1, len(e.labels)):
            if e.labels[i] != IGNORE:
                predicting.append(r * longest + i - 1)
                targets.append(e.labels[i])
    return _batch(tokens, None, None, predicting, targets, examples)


def _shared(examples: list[Example], prefix: int) -> Batch:
    tokens, positions, rows = examples[0].tokens[:prefix], list(range(prefix)), [-1] * prefix
    predicting, targets = [], []
    for r, e in enumerate(examples):
        shift = len(tokens) - prefix
        for i in range(max(1, e.first_label), len(e.labels)):
            if e.labels[i] != IGNORE:
                predicting.append(shift + i - 1)
                targets.append(e.labels[i])
        tokens = tokens + e.tokens[prefix:-1]
        positions += range(prefix, len(e.tokens) - 1)
        rows += [r] * (len(e.tokens) - 1 - prefix)
    row = torch.tensor(rows)
    mask = ((row[:, None] == row[None, :]) | (row[None, :] == -1)).tril()
    return _batch(torch.tensor([tokens]), torch.tensor([positions]), mask[None], predicting, targets, examples)


def _batch(tokens, positions, mask, predicting, targets, examples) -> Batch:
    return Batch(
        tokens, positions, mask, torch.tensor(predicting), torch.tensor(targets), sum(len(e.tokens) for e in examples)
    )


_PREFIX, _PAD = -1, -2  # whose a token is: all rows' of its pack, or nobody's


def _packed(packs: list[tuple[Example, ...]], share_prefix: bool) -> Batch:
    """[packs, longest]: packs of rows (`packing`), each laid out as the shared layout lays out a whole batch."""
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
    # Pad tokens see each other: a token that saw nothing would have no attention to share out.
    mask = ((whose[:, :, None] == whose[:, None, :]) | (whose[:, None, :] == _PREFIX)).tril()
    return _batch(tokens, positions, mask, predicting, targets, [e for rows in packs for e in rows])


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
