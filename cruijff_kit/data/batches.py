"""Collate examples into tensors: which rows share a batch, and how a batch is laid out without waste.

Two layouts give the same losses:

padded   [rows, longest]. Right-padded; causality keeps the pad tokens from mattering.
shared   [1, prefix + all the rest]. The common prefix of all rows comes once, then the other tokens of each row; a row
         attends to the prefix and itself, and its positions continue the prefix's. No pad tokens; the prefix is
         computed once. Attention runs over everything, with a mask, or (where calls are cheap) row by row, without one.
         Packed rows (`packing`) are laid out so pack by pack: [packs, longest pack].

The cheapest layout is chosen. Each leaves out a row's last token, because nothing is predicted from it.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from cruijff_kit.data.examples import IGNORE, Example
from cruijff_kit.data.packing import PackedSequence, unpack

_PREFIX, _PAD = -1, -2  # row numbers of tokens that belong to all rows of a pack, or to none
_CHUNK = 50  # batches among which rows are sorted by length: enough to find like rows, few enough to stay random


@dataclass(frozen=True)
class AttentionCost:
    """Cost of attention, in units of one token through the linear layers."""

    pair: float
    """Cost of one query-key pair."""
    call: float | None = None
    """Fixed cost of one call, in pairs; None: attention cannot run row by row."""


@dataclass(frozen=True)
class Spans:
    """Replaces a mask: where the tokens of each row are in a batch of one sequence."""

    prefix: int
    """Number of tokens at the beginning that all rows share."""
    own: tuple[int, ...]
    """Number of further tokens of each row."""

    @property
    def pairs(self) -> int:
        """Return the number of query-key pairs, row by row."""
        return self.prefix**2 + sum(n * (self.prefix + n) for n in self.own)


@dataclass
class Batch:
    """Rows ready for the model."""

    tokens: torch.Tensor
    """[b, s] ids."""
    positions: torch.Tensor | None
    """[b, s]; None for 0..s-1."""
    mask: torch.Tensor | Spans | None
    """[b, s, s], True where attention is allowed; None for causal; Spans for attention row by row."""
    target_positions: torch.Tensor
    """[n] indices into the flattened [b * s] of the positions that predict a target token."""
    targets: torch.Tensor
    """[n] ids of the target tokens."""
    num_tokens: int
    """Number of tokens of the rows, each counted with its prefix."""

    def to(self, device: torch.device) -> "Batch":
        """Return the same batch on a device."""
        tensors = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return Batch(**{**vars(self), **tensors})


def batch_order(
    lengths: list[int], batch_size: int, *, seed: int, epoch: int, shuffle: bool, group_by_length: bool
) -> list[list[int]]:
    """Return the row numbers of each batch of an epoch: every row once; the last batch may be smaller.

    Args:
        lengths: tokens of each row.
        batch_size: rows per batch.
        seed, epoch: they seed the order.
        shuffle: False keeps the order of the file.
        group_by_length: after shuffling, sort chunks of 50 batches by length and shuffle the batches again.
    """
    rows = list(range(len(lengths)))
    if not shuffle:
        return [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    rng = random.Random(f"{seed} {epoch}")
    rng.shuffle(rows)
    if group_by_length:
        chunk = _CHUNK * batch_size
        rows = [r for i in range(0, len(rows), chunk) for r in sorted(rows[i : i + chunk], key=lengths.__getitem__)]
    batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    if group_by_length:
        rng.shuffle(batches)
    return batches


def make_batch(
    examples: Sequence[Example | PackedSequence], attention_cost: AttentionCost, share_prefix: bool = True
) -> Batch:
    """Lay out a batch in the cheapest way.

    Args:
        examples: rows, or packs of rows; where attention runs row by row, it does not matter which pack a row is in.
        attention_cost: of the model on its device.
        share_prefix: False forces the padded layout. Dropout needs it, because each row has its own dropout on the prefix.
    """
    packs = [unpack(e) for e in examples]
    rows = tuple(row for pack in packs for row in pack)
    if len(rows) > len(packs) and attention_cost.call is None:
        return _collate_shared(packs, share_prefix)
    prefix = common_prefix(rows)
    spans = Spans(prefix, tuple(len(e.tokens) - 1 - prefix for e in rows))
    total, longest, pair = prefix + sum(spans.own), prefix + max(spans.own), attention_cost.pair
    padded = len(rows) * (longest + pair * longest**2)
    masked = total + pair * total**2
    by_rows = math.inf
    if attention_cost.call is not None:
        by_rows = total + pair * (spans.pairs + attention_cost.call * len(rows))
    if not share_prefix or len(rows) == 1 or padded <= min(masked, by_rows):
        return _collate_padded(rows, longest)
    return _collate_shared([rows], share_prefix, spans if by_rows < masked else None)


def common_prefix(examples: Sequence[Example]) -> int:
    """Return how many tokens all rows begin with, at most up to the token that predicts the first target token."""
    first = examples[0].tokens
    limit = min(e.first_label - 1 for e in examples)
    for i in range(limit):
        if any(e.tokens[i] != first[i] for e in examples):
            return i
    return limit


def _collate_padded(examples: Sequence[Example], longest: int) -> Batch:
    tokens = torch.zeros(len(examples), longest, dtype=torch.long)
    target_positions, targets = [], []
    for r, e in enumerate(examples):
        tokens[r, : len(e.tokens) - 1] = torch.tensor(e.tokens[:-1])
        for i in range(1, len(e.labels)):
            if e.labels[i] != IGNORE:
                target_positions.append(r * longest + i - 1)
                targets.append(e.labels[i])
    return _make_batch(tokens, None, None, target_positions, targets, examples)


def _make_batch(tokens, positions, mask, target_positions, targets, examples) -> Batch:
    return Batch(
        tokens,
        positions,
        mask,
        torch.tensor(target_positions),
        torch.tensor(targets),
        sum(len(e.tokens) for e in examples),
    )


def _collate_shared(packs: list[tuple[Example, ...]], share_prefix: bool, spans: Spans | None = None) -> Batch:
    """Lay out packs of rows in the shared layout, [packs, longest]; a single pack may have `spans` instead of a mask."""
    collated = [_collate_pack(rows, common_prefix(rows) if share_prefix and len(rows) > 1 else 0) for rows in packs]
    longest = max(len(pack.tokens) for pack in collated)
    tokens, positions = (torch.zeros(len(packs), longest, dtype=torch.long) for _ in range(2))
    row_ids = torch.full((len(packs), longest), _PAD)
    target_positions, targets = [], []
    for p, pack in enumerate(collated):
        end = len(pack.tokens)
        tokens[p, :end], positions[p, :end] = torch.tensor(pack.tokens), torch.tensor(pack.positions)
        row_ids[p, :end] = torch.tensor(pack.row_ids)
        target_positions += [p * longest + i for i in pack.target_positions]
        targets += pack.targets
    rows = [e for pack in packs for e in pack]
    return _make_batch(tokens, positions, _mask(row_ids) if spans is None else spans, target_positions, targets, rows)


def _mask(row_ids: torch.Tensor) -> torch.Tensor:
    # Pad tokens attend to each other: the softmax of a token that attends to nothing would be NaN.
    return ((row_ids[:, :, None] == row_ids[:, None, :]) | (row_ids[:, None, :] == _PREFIX)).tril()


@dataclass
class _CollatedPack:
    """The tokens of a pack, in the shared layout."""

    tokens: list[int]
    positions: list[int]
    row_ids: list[int]
    """Number of the row that each token belongs to, or _PREFIX."""
    target_positions: list[int]
    targets: list[int]


def _collate_pack(rows: tuple[Example, ...], prefix: int) -> _CollatedPack:
    pack = _CollatedPack(list(rows[0].tokens[:prefix]), list(range(prefix)), [_PREFIX] * prefix, [], [])
    for number, e in enumerate(rows):
        shift = len(pack.tokens) - prefix
        label_indices = [i for i in range(max(1, e.first_label), len(e.labels)) if e.labels[i] != IGNORE]
        pack.target_positions += [shift + i - 1 for i in label_indices]
        pack.targets += [e.labels[i] for i in label_indices]
        pack.tokens += e.tokens[prefix:-1]
        pack.positions += range(prefix, len(e.tokens) - 1)
        pack.row_ids += [number] * (len(e.tokens) - 1 - prefix)
    return pack
