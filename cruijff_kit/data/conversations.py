"""Turn rows into prompts and answers: the one path for training, evaluation, preview and checks. No torch.

Three kinds of rows:

columns      an output column, and a prompt that is filled from the others
messages     [{"role", "content"}, ...] in a column messages, or conversations with from / value; or two lists in the
             columns prompt and completion. The last assistant turn is the answer; later messages are dropped
prompt and completion as text: columns under these names
"""

import math
from dataclasses import dataclass, field
from typing import Any

from cruijff_kit.data.dataset_files import DataPath
from cruijff_kit.data.readers import Row
from cruijff_kit.data.rows import cell_text, fill_prompt, read_split, select_rows
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import quote, quote_names
from cruijff_kit.util.suggest import did_you_mean

Message = dict[str, str]
"""{"role": "system" | "user" | "assistant", "content": text}"""

DEFAULT_PROMPT = "{input}\n"
_MESSAGES = ("messages", "conversations")  # where conversations stand, unless column_map.messages says otherwise
_PAIR = {"input": "prompt", "output": "completion"}
_ROLES = {r: r for r in ("system", "user", "assistant")} | {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Conversation:
    """The prompt of a row, and its answer."""

    messages: list[Message]
    """All messages before the answer."""
    answer: str
    values: list[str] = field(default_factory=list)
    """The row's own texts in the messages, without the fixed words of the prompt template."""
    row: int = 0
    """The row's number in its split."""
    has_messages: bool = False
    """Whether the row holds a conversation, not columns."""
    columns: dict[str, str | int | float | bool] = field(default_factory=dict)
    """The row's other columns of one value each, which name groups of rows; neither prompt nor answer comes from them."""


def read_conversations(
    path: DataPath,
    split: str,
    column_map: dict[str, str | None],
    prompt: str = DEFAULT_PROMPT,
    system_prompt: str = "",
    max_samples: int | None = None,
    *,
    format: str | None = None,
    split_column: str | None = "split",
    type: str | None = None,
    sample_seed: int | None = None,
) -> list[Conversation]:
    """Read the rows of a split that are used, in the order of the file.

    Args:
        path, split, format, split_column: as `rows.read_split`.
        column_map: the columns of "input", "output" and "messages"; one that is missing has that name.
        prompt: template of the user's message.
        system_prompt: the system message; empty: none, or those of the rows.
        max_samples, sample_seed: as `rows.select_rows`.
        type: "messages" reads conversations, "chat" and "text" columns; None: whichever the first row has.
    Raises:
        UserError: malformed data; the message names file, split and row.
    """
    rows = read_split(path, split, format, split_column)
    file = path if isinstance(path, str) else path[split]
    parse = _choose_parser(rows[0], column_map, prompt, system_prompt, type, f"{file}, split {split!r}")
    numbers = select_rows(len(rows), max_samples, sample_seed, split)
    return [parse(rows[n], n, f"{file}, split {split!r}, row {n}") for n in numbers]


def read_columns(
    path: DataPath, split: str, format: str | None = None, split_column: str | None = "split"
) -> list[str]:
    """Return the columns of a split's first row. Raises UserError as `rows.read_split`."""
    return [*read_split(path, split, format, split_column)[0]]


def _choose_parser(
    first: Row, column_map: dict[str, str | None], prompt: str, system_prompt: str, type: str | None, where: str
):
    """Return the function (row, number, where) -> Conversation that fits the rows of a split."""
    columns = {"input": "input", "output": "output"} | {k: v for k, v in column_map.items() if v is not None}
    renamed = columns["input"] != "input" or columns["output"] != "output"
    if type != "messages" and not renamed and columns["output"] not in first and _holds_pair(first, str):
        columns |= _PAIR
    if type != "messages" and (columns["output"] in first or (type is not None) or not _has_messages(first, columns)):
        return lambda row, number, where: _from_columns(row, number, columns, prompt, system_prompt, where)
    if prompt != DEFAULT_PROMPT:
        raise UserError(
            f"{where}: the rows hold whole conversations, which do not use dataset.prompt={prompt!r}; leave it out, or "
            "set dataset.type=chat and name the output column (dataset.column_map)"
        )
    return lambda row, number, where: _from_messages(row, number, columns, system_prompt, where)


def _holds_pair(row: Row, kind: type) -> bool:
    return all(isinstance(row.get(column), kind) for column in _PAIR.values())


def _has_messages(row: Row, columns: dict[str, str]) -> bool:
    return "messages" in columns or any(c in row for c in _MESSAGES) or _holds_pair(row, list)


def _from_columns(
    row: Row, number: int, columns: dict[str, str], prompt: str, system_prompt: str, where: str
) -> Conversation:
    answer = cell_text(row, columns["output"], where)
    if not answer.strip():
        raise UserError(f"{where}: column {columns['output']!r} is empty; it must hold the answer")
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    text, values = fill_prompt(prompt, row, columns, where)
    scalars = _scalars(row, columns["input"], columns["output"])
    return Conversation([*system, {"role": "user", "content": text}], answer, values, number, columns=scalars)


def _from_messages(row: Row, number: int, columns: dict[str, str], system_prompt: str, where: str) -> Conversation:
    column = columns.get("messages") or next((c for c in _MESSAGES if c in row), None)
    if column is None and _holds_pair(row, list):
        messages = [m for c in _PAIR.values() for m in _parse_messages(row, c, where)]
    else:
        messages = _parse_messages(row, column or "messages", where)
    if system_prompt:
        rest = [m for m in messages if m["role"] != "system"]
        messages = [{"role": "system", "content": system_prompt}, *rest]
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    if not turns:
        raise UserError(f"{where}: no message of the assistant, so there is no answer to train on")
    for i in turns:
        if not messages[i]["content"].strip():
            raise UserError(f"{where}, message {i}: the assistant's message is empty; it must hold the answer")
    prompt = messages[: turns[-1]]
    if not any(m["role"] == "user" for m in messages[: turns[0]]):
        raise UserError(f"{where}: the conversation begins with the assistant; a message of the user must come first")
    values = [m["content"] for m in prompt if m["role"] != "system"]
    return Conversation(
        prompt, messages[turns[-1]]["content"], values, number, has_messages=True, columns=_scalars(row)
    )


def _scalars(row: Row, *excluded: str) -> dict[str, str | int | float | bool]:
    """Return the columns of a row that hold one value each, without missing values and NaN."""
    scalars = {k: v for k, v in row.items() if k not in excluded and isinstance(v, str | int | float)}
    return {k: v for k, v in scalars.items() if not isinstance(v, float) or math.isfinite(v)}


def _parse_messages(row: Row, column: str, where: str) -> list[Message]:
    if column not in row:
        raise UserError(f"{where}: no column {column!r}; {did_you_mean(column, quote_names(row))}")
    if not isinstance(row[column], list) or not row[column]:
        form = '{"role": ..., "content": ...}'
        raise UserError(f"{where}: column {column!r} must be a list of messages {form}, not {quote(row[column], 40)}")
    return [_parse_message(m, f"{where}, message {i}") for i, m in enumerate(row[column])]


def _parse_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(f'{where}: must be {{"role": ..., "content": ...}}, not {quote(message, 40)}')
    role, content = (
        next((message[k] for k in keys if message.get(k) is not None), None)
        for keys in (("role", "from"), ("content", "value"))
    )
    if role not in _ROLES:
        raise UserError(f"{where}: the role {quote(role, 40)} is not known; valid: {', '.join(_ROLES)}")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise UserError(f"{where}: its content must be text, not {quote(content, 40)}")
    return {"role": _ROLES[role], "content": content}
