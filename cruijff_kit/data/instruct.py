"""The one path from a row to what the model reads, for training and evaluation alike.

`conversation` makes the messages of a row, `InstructDataset` their token ids. Evaluation tasks call `conversation` too,
so a prompt cannot be worded in two ways.
"""

import contextlib
from dataclasses import dataclass
from typing import Any

from cruijff_kit.data.rows import Row, fill, read_split, text
from cruijff_kit.errors import UserError
from cruijff_kit.progress import progress

_LONG = 5000  # rows that take more than a second to tokenise

IGNORE = -100
"""Label of a position that is not learnt (torch's cross-entropy ignore_index)."""

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""


@dataclass(frozen=True)
class Conversation:
    """What a row asks, and the answer it wants."""

    messages: list[Message]
    answer: str


@dataclass(frozen=True)
class Example:
    """A row as the model reads it: `tokens[i]` is learnt where `labels[i]` equals it, else `labels[i]` is IGNORE."""

    tokens: list[int]
    labels: list[int]
    cut: int
    """Tokens that did not fit into max_seq_len."""

    @property
    def first_label(self) -> int:
        """Index of the first token that is learnt."""
        return next(i for i, label in enumerate(self.labels) if label != IGNORE)


def conversation(row: Row, column_map: dict[str, str], prompt: str, system_prompt: str, where: str) -> Conversation:
    """The messages of a row and its answer.

    Args:
        row: the row.
        column_map: {"input": column, "output": column}.
        prompt: template of the user's message.
        system_prompt: the system message; empty for none.
        where: file, split and row number, for error messages.
    Raises:
        UserError: a column is missing, is not text, or the answer is empty.
    """
    answer = text(row, column_map["output"], where)
    if not answer:
        raise UserError(f"{where}: column {column_map['output']!r} is empty; there is nothing to learn")
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return Conversation([*system, {"role": "user", "content": fill(prompt, row, column_map, where)}], answer)


def conversations(
    path: str, split: str, column_map: dict[str, str], prompt: str, system_prompt: str, max_samples: int | None = None
) -> list[Conversation]:
    """`conversation` of each row of a split, in the file's order."""
    rows = read_split(path, split)[:max_samples]
    return [
        conversation(row, column_map, prompt, system_prompt, f"{path}, split {split!r}, row {number}")
        for number, row in enumerate(rows)
    ]


class InstructDataset:
    """A split as token ids; a sequence of `Example`. Built by the torchtune config with the tokenizer first.

    Args:
        tokenizer: turns messages and an answer into ids (`models.tokenizer.ChatTokenizer`).
        data_files: JSON file.
        split: name of the split.
        column_map: {"input": column, "output": column}.
        prompt: template of the user's message.
        system_prompt: the system message; empty for none.
        train_on_input: learn the prompt's tokens too.
        max_samples: only the first rows.
    Raises:
        UserError: malformed data (file, split and row are named), or an answer that max_seq_len cuts off wholly.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        data_files: str,
        split: str,
        column_map: dict[str, str],
        prompt: str,
        system_prompt: str,
        train_on_input: bool = False,
        max_samples: int | None = None,
    ) -> None:
        asked = conversations(data_files, split, dict(column_map), prompt, system_prompt, max_samples)
        self.tokenizer, self.train_on_input = tokenizer, train_on_input
        with progress(f"tokenising {split}", len(asked)) if len(asked) > _LONG else contextlib.nullcontext() as bar:
            self.examples = []
            for number, c in enumerate(asked):
                self.examples.append(self._example(c, f"{data_files}, split {split!r}, row {number}"))
                if bar:
                    bar.advance()

    def _example(self, c: Conversation, where: str) -> Example:
        tokens, prompt_length = self.tokenizer.example(c.messages, c.answer)
        limit = self.tokenizer.max_seq_len or len(tokens)
        if prompt_length >= limit:
            raise UserError(
                f"{where}: the prompt alone has {prompt_length} tokens, so dataset.max_seq_len={limit} cuts off the "
                f"whole answer; raise it to {len(tokens)}"
            )
        learnt = 1 if self.train_on_input else prompt_length
        labels = [IGNORE] * learnt + tokens[learnt:]
        return Example(tokens[:limit], labels[:limit], max(0, len(tokens) - limit))

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]
