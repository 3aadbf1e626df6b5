"""A tokenised row."""

from dataclasses import dataclass

IGNORE = -100
"""Label of a position without a loss (torch's cross-entropy ignore_index)."""


@dataclass(frozen=True)
class Example:
    """A row as the model reads it: `labels[i]` is `tokens[i]` for a target token, else IGNORE."""

    tokens: list[int]
    labels: list[int]
    cut: int
    """Number of tokens that max_seq_len cut off."""
    row: int = 0
    """The row's number in its split."""

    @property
    def first_label(self) -> int:
        """Return the index of the first target token."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORE)
