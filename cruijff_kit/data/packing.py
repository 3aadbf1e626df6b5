"""Sequence packing: several rows count as one row of batch_size (torchtune's `pack_sequences`). No torch.

Rows of a pack do not attend to each other, and each counts its positions from 0 (see `batches`), so that a pack has the
loss and gradients of its rows.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cruijff_kit.data.examples import Example


@dataclass(frozen=True)
class PackedSequence:
    """Rows that training treats as one; it has the interface of an `Example`."""

    examples: tuple["Example", ...]

    @functools.cached_property
    def tokens(self) -> list[int]:
        """Concatenated tokens of the rows."""
        return [t for e in self.examples for t in e.tokens]

    @property
    def labels(self) -> list[int]:
        """Concatenated labels of the rows."""
        return [label for e in self.examples for label in e.labels]

    @property
    def cut(self) -> int:
        """Number of tokens of all rows that max_seq_len cut off."""
        return sum(e.cut for e in self.examples)


def pack_sequences(examples: Iterable["Example"], max_seq_len: int) -> list[PackedSequence]:
    """Fill packs greedily in the order of the rows, without splitting a row.

    Args:
        examples: rows of at most max_seq_len tokens.
        max_seq_len: maximum number of tokens in a pack.
    """
    packs: list[list[Example]] = []
    free = 0
    for e in examples:
        if not packs or len(e.tokens) > free:
            packs.append([])
            free = max_seq_len
        packs[-1].append(e)
        free -= len(e.tokens)
    return [PackedSequence(tuple(pack)) for pack in packs]


def unpack(example: "Example | PackedSequence") -> tuple["Example", ...]:
    """Return the rows of a pack; an unpacked row is returned alone."""
    return example.examples if isinstance(example, PackedSequence) else (example,)
