"""Examples as tensors: which rows share a batch, and how a batch is laid out without waste.

Two layouts give the same losses:

padded   [rows, longest]. Right-padded; causality keeps the pad tokens from mattering.
packed   [packs, longest]. The tokens that all rows of a pack begin with stand once, each row's own follow; a mask lets a
         row see the prefix and itself, and its positions continue the prefix's.

Of rows the cheaper one is taken: padded, or all of them as one pack, which has no pad tokens and computes the prefix once.
Packs (`packing`) are laid out as they are. In both, a row's last token is left out: nothing is predicted from it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cruijff_kit.data.instruct import IGNORE, Example
from cruijff_kit.data.packing import Pack, rows_of

_CHUNK = 50  # batches among which rows are sorted by length: enough to find like rows, few enough to stay random
_PREFIX, _PAD = -1, -2  # whose a token is: all rows' of its pack, or nobody's


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


def make_batch(examples: list[Example | Pack], attention_cost: float, share_prefix: bool = True) -> Batch:
    """Lay out a batch in the cheaper way.

    Args:
        examples: the rows, or packs of rows.
        attention_cost: cost of one (token, token) pair of attention in units of one token through the linear layers.
        share_prefix: False forces a layout where each row has its prefix to itself (needed where rows must differ on it,
            as with dropout).
    """
    packs = [rows_of(e) for e in examples]
    if any(len(rows) > 1 for rows in packs):
        return _packed(packs, share_prefix)
    rows = [row for (row,) in packs]
    prefix = common_prefix(rows)
    own = [len(e.tokens) - 1 - prefix for e in rows]
    shared, longest = prefix + sum(own), prefix + max(own)
    cost_shared = shared + attention_cost * shared**2
    cost_padded = len(rows) * (longest + attention_cost * longest**2)
    if share_prefix and len(rows) > 1 and cost_shared < cost_padded:
        return _packed([rows], share_prefix)
    return _padded(rows, longest)


def common_prefix(examples: Sequence[Example]) -> int:
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


def _packed(packs: list[Sequence[Example]], share_prefix: bool) -> Batch:
    """Each pack as one row of the batch: the prefix of its rows once, then each row's own tokens."""
    laid = [_lay(rows, common_prefix(rows) if share_prefix and len(rows) > 1 else 0) for rows in packs]
    longest = max(len(one.tokens) for one in laid)
    tokens, positions = (torch.zeros(len(laid), longest, dtype=torch.long) for _ in range(2))
    row = torch.full((len(laid), longest), _PAD)
    predicting, targets = [], []
    for p, one in enumerate(laid):
        end = len(one.tokens)
        tokens[p, :end], positions[p, :end] = torch.tensor(one.tokens), torch.tensor(one.positions)
        row[p, :end] = torch.tensor(one.rows)
        predicting += [p * longest + i for i in one.predicting]
        targets += one.targets
    # Pad tokens see each other: a token that saw nothing would have no attention to share out.
    mask = ((row[:, :, None] == row[:, None, :]) | (row[:, None, :] == _PREFIX)).tril()
    return _batch(tokens, positions, mask, predicting, targets, [e for rows in packs for e in rows])


@dataclass
class _Laid:
    """A pack's tokens, their positions and whose they are; which of them predict, and what."""

    tokens: list[int]
    positions: list[int]
    rows: list[int]
    predicting: list[int]
    targets: list[int]


def _lay(examples: Sequence[Example], prefix: int) -> _Laid:
    laid = _Laid(list(examples[0].tokens[:prefix]), list(range(prefix)), [_PREFIX] * prefix, [], [])
    for r, e in enumerate(examples):
        shift = len(laid.tokens) - prefix
        for i in range(max(1, e.first_label), len(e.labels)):
            if e.labels[i] != IGNORE:
                laid.predicting.append(shift + i - 1)
                laid.targets.append(e.labels[i])
        laid.tokens += e.tokens[prefix:-1]
        laid.positions += range(prefix, len(e.tokens) - 1)
        laid.rows += [r] * (len(e.tokens) - 1 - prefix)
    return laid


def _batch(tokens, positions, mask, predicting, targets, examples) -> Batch:
    return Batch(
        tokens, positions, mask, torch.tensor(predicting), torch.tensor(targets), sum(len(e.tokens) for e in examples)
    )
