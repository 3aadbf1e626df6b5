"""A tokenised row."""

from dataclasses import dataclass

IGNORE = -100
"""Label of a position that is not learnt (torch's cross-entropy ignore_index)."""


@dataclass(frozen=True)
class Example:
    """A row as the model reads it: `tokens[i]` is learnt where `labels[i]` equals it, else `labels[i]` is IGNORE."""

    tokens: list[int]
    labels: list[int]
    cut: int
    """Number of tokens that max_seq_len cut off."""
    row: int = 0
    """The row's number in its split."""

    @property
    def first_label(self) -> int:
        """Index of the first token that is learnt."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORE)
