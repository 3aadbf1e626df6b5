"""What tasks over the rows of a data set share: samples worded exactly as in training, and the scorers they choose."""

import functools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import (
    ChatMessage,
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    GenerateConfig,
)
from inspect_ai.scorer import Scorer
from inspect_ai.solver import generate

from cruijff_kit.data.conversations import Message, read_conversations
from cruijff_kit.data.dataset_files import DataPath, hash_data
from cruijff_kit.evaluation.chance import TEST, TRAIN, targets_of, with_chance
from cruijff_kit.evaluation.scorers import exact, includes, plain
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import quote

MOST_OPTIONS = 20  # alternatives per token that every provider gives
_KINDS = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def answers_task(
    data: DataPath,
    split: str,
    prompt: str,
    system_prompt: str,
    input_column: str,
    output_column: str,
    messages_column: str | None = None,
    *,
    train_split: str | None = None,
    train_samples: int | None = None,
    scorer: list[Scorer] | Callable[[list[str]], list[Scorer]] | None = None,
    config: GenerateConfig | None = None,
    **chosen: Any,
) -> Task:
    """A task that asks each row of a split; the target is the row's output.

    Of a conversation, the assistant's last turn is asked for. Each sample carries in its metadata the split, its row's
    number ("row"), and every other column of the row that is one value, for comparing groups.

    Args:
        train_split, train_samples: what was trained on, and at most how many of its rows: the constant baseline (`chance`)
            knows their outputs. None, or no such split: it knows those of `split`.
        scorer: the scorers, or what makes them from the targets; None: exact (named match: the answer is the output) and
            includes (the output stands somewhere in the answer).
        config: how to decode.
        chosen: format, split_column, type, max_samples, sample_seed of `read_conversations`.
    Raises:
        UserError: malformed data; file, split and row are named.
    """
    columns = {"input": input_column, "output": output_column, "messages": messages_column}
    asked: dict[str, Any] = {"prompt": prompt, "system_prompt": system_prompt}
    samples = [
        Sample(
            id=c.row,
            input=[_message(m) for m in c.messages],
            target=c.answer,
            metadata=c.columns | {"split": split, "row": c.row},
        )
        for c in read_conversations(data, split, columns, **asked, **chosen)
    ]
    if callable(scorer):
        scorer = scorer([s.target for s in samples])
    task = Task(
        dataset=MemoryDataset(samples, name=split, location=data if isinstance(data, str) else data[split]),
        solver=generate(),
        scorer=scorer or [exact(case_sensitive=True), includes(case_sensitive=True)],
        config=config or GenerateConfig(),
    )
    trained = {**chosen, **asked, "column_map": columns, "split": train_split, "max_samples": train_samples}
    outputs = None if train_split is None else _outputs(data, trained)
    return with_chance(task, targets_of(task), TEST) if outputs is None else with_chance(task, outputs, TRAIN)


def _outputs(data: DataPath, rows: dict[str, Any]) -> Counter[str] | None:
    """Text -> how often it is the output of a row; None where there are no such rows."""
    try:
        named = data if isinstance(data, str) else dict(data)
        return _count(json.dumps([named, rows], sort_keys=True), hash_data(data, rows.get("format")))
    except UserError:  # data to be asked may come without what was trained on
        return None


@functools.lru_cache(maxsize=8)
def _count(rows: str, data_hash: str) -> Counter[str]:
    """As `_outputs`; a task is built several times in a run."""
    data, chosen = json.loads(rows)
    return Counter(plain(c.answer) for c in read_conversations(data, **chosen))


def options_of(task: str, options: list[str] | None, **rows: Any) -> list[str]:
    """The options of a task: those that are given, or the different outputs of the split, in order, numbers by their size.

    Args:
        task: its name, for the message.
        rows: arguments of `answers_task`. All rows of the split count, also those that max_samples leaves out.
    Raises:
        UserError: the split has fewer than two different outputs, or more than MOST_OPTIONS.
    """
    if options is not None:
        return [str(o) for o in options]
    found: dict[str, str] = {}
    for sample in answers_task(**rows | {"max_samples": None, "train_split": None}).dataset:
        found.setdefault(plain(sample.target), sample.target)
    if not 2 <= len(found) <= MOST_OPTIONS:
        some = ", ".join(map(quote, [*found][: 1 if redaction.is_enabled() else 3])) + (
            ", ..." if len(found) > 3 else ""
        )
        raise UserError(
            f"eval task {task}: the outputs of split {rows['split']!r} are {len(found)} different texts ({some}), not 2 to "
            f"{MOST_OPTIONS} options; name them, the positive one last: 'eval.task_args.{task}.options=[no,yes]', or take "
            "eval=match (texts) or eval=number"
        )
    by_size = all(text.isdecimal() for text in found)
    return [found[text] for text in sorted(found, key=int if by_size else None)]


def _message(message: Message) -> ChatMessage:
    return _KINDS[message["role"]](content=message["content"])
