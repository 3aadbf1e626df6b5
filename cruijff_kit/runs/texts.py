"""Load the texts that a model reads: typed, from a file, or rows of a data set as evaluation prompts them. No torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.config.run import RunConfig
from cruijff_kit.data.conversations import Conversation, read_conversations
from cruijff_kit.data.dataset_files import find_files
from cruijff_kit.data.generators import generate
from cruijff_kit.data.readers import read_file
from cruijff_kit.data.rows import cell_text
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.suggest import did_you_mean


@dataclass(frozen=True)
class Text:
    """A text as the model reads it."""

    id: int
    """Number of the row in its split or file, counted from 0."""
    shown: str
    """The text for people."""
    ids: list[int]
    """Its tokens."""
    answer: list[int]
    """Tokens of the answer, of a row of a data set."""


def tokenise_texts(texts: list[str], tokenizer: Any) -> list[Text]:
    """Tokenise plain texts, with the special tokens that the tokenizer adds (as transformers' tokenizer(text)).

    Raises:
        UserError: one that has no token.
    """
    tokenised = [Text(n, t, tokenizer.encode(t, add_special_tokens=True), []) for n, t in enumerate(texts)]
    for t in tokenised:
        if not t.shown.strip() or not t.ids:
            raise UserError(f"text {t.id} (counted from 0) is empty; leave it out")
    return tokenised


def read_file_texts(file: Path, column: str | None) -> list[str]:
    """Read the texts of a file: its non-empty lines, or a column of a table.

    Raises:
        UserError: no such file or column, a cell that is no text, or nothing in it.
    """
    if not file.is_file():
        raise UserError(f"--file: no such file {file}")
    if file.suffix in ("", ".txt", ".text"):
        if column is not None:
            raise UserError(f"--column {column}: {file} is plain text, a text a line; leave --column out")
        texts = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    else:
        texts = _read_column(file, column)
    if not texts:
        raise UserError(f"{file} holds no text")
    return texts


def _read_column(file: Path, column: str | None) -> list[str]:
    content = read_file(find_files(str(file), None).single)
    if isinstance(content, dict):
        raise UserError(f"{file} holds splits; train on it with dataset.path={file}, then --split chooses one")
    columns = [*content[0]] if content else []
    if column is None and len(columns) > 1 and "text" not in columns:
        raise UserError(f"{file} has the columns {', '.join(columns)}; --column NAME says which holds the texts")
    column = column or ("text" if "text" in columns else next(iter(columns), ""))
    if columns and column not in columns:
        raise UserError(f"{file} has no column {column!r}; {did_you_mean(column, columns)}")
    return [cell_text(row, column, f"{file}, row {n}") for n, row in enumerate(content)]


def read_split_texts(config: RunConfig, split: str | None, most: int | None, tokenizer: Any) -> list[Text]:
    """Read rows of the config's data set as the prompt tokens of evaluation.

    Args:
        split: None: the test split. most: maximum number of rows; None: all.
    Raises:
        UserError: the data is missing or malformed.
    """
    rows = read_split_rows(config, split)[:most]
    if rows[0].has_messages and tokenizer.kind == "base":
        raise UserError(f"{config.dataset.path} holds conversations, which a base model has no template for")
    return [_make_text(c, tokenizer) for c in rows]


def _make_text(c: Conversation, tokenizer: Any) -> Text:
    whole, length = tokenizer.encode_example(c.messages, c.answer)
    return Text(c.row, tokenizer.decode(whole[:length], skip_special_tokens=False), whole[:length], whole[length:])


def read_split_rows(config: RunConfig, split: str | None) -> list[Conversation]:
    """Read the rows of a split that evaluation would use; a generated data set is generated if need be."""
    data = config.dataset  # what is drawn lies in this machine's cache, wherever it was when the run was made
    path = data.path if data.generator is None else str(generate(data.generator, data.arguments))
    return read_conversations(
        path, split or data.test_split, data.column_map, data.prompt, data.system_prompt, data.max_test_samples,
        format=data.format, split_column=data.split_column, type=data.type, sample_seed=data.sample_seed,
    )  # fmt: skip


def reject_long_texts(texts: list[Text], context: int, name: str, answers: bool) -> None:
    """Raise UserError if a text (with its answer, if `answers`) has more tokens than the model reads."""
    for t in texts:
        length = len(t.ids) + len(t.answer) * answers
        if length > context:
            raise UserError(f"text {t.id} has {length} tokens, {name} reads at most {context}; shorten it")
