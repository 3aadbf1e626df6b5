"""Several rows in one: a pack counts as one row of batch_size (torchtune's `packed`). No torch.

Rows of a pack do not see each other, and each counts its positions from 0 (`batches` lays it out so); a pack's loss and
gradients are those of its rows.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cruijff_kit.data.examples import Example


@dataclass(frozen=True)
class Pack:
    """Rows that are trained on as one; looks like an `Example` from outside."""

    examples: tuple["Example", ...]

    @functools.cached_property
    def tokens(self) -> list[int]:
        """The rows' tokens, one row after the other."""
        return [t for e in self.examples for t in e.tokens]

    @property
    def labels(self) -> list[int]:
        """The rows' labels, one row after the other."""
        return [label for e in self.examples for label in e.labels]

    @property
    def cut(self) -> int:
        """Tokens of all the rows that did not fit into max_seq_len."""
        return sum(e.cut for e in self.examples)


def packed(examples: Iterable["Example"], max_seq_len: int) -> list[Pack]:
    """Fill packs greedily, in the order of the rows; no row is split.

    Args:
        examples: rows of at most max_seq_len tokens.
        max_seq_len: most tokens of a pack.
    """
    packs: list[list[Example]] = []
    room = 0
    for e in examples:
        if not packs or len(e.tokens) > room:
            packs.append([])
            room = max_seq_len
        packs[-1].append(e)
        room -= len(e.tokens)
    return [Pack(tuple(pack)) for pack in packs]


def rows_of(example: "Example | Pack") -> tuple["Example", ...]:
    """The rows of a pack; a row alone is its own."""
    return example.examples if isinstance(example, Pack) else (example,)
