"""Shared code of tasks over the rows of a data set: arguments, samples worded exactly as in training, scorers."""

import functools
import inspect
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
from inspect_ai.solver import Solver, generate

from cruijff_kit.data.conversations import Message, read_conversations
from cruijff_kit.data.dataset_files import DataPath, hash_data
from cruijff_kit.evaluation.chance import TEST, TRAIN, targets_of, with_chance
from cruijff_kit.evaluation.scorers import exact, includes, plain
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import quote

MOST_OPTIONS = 20  # alternatives per token that every provider gives
_KINDS = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def _rows(
    data: DataPath,
    split: str = "test",
    prompt: str = "{input}\n",
    system_prompt: str = "",
    input_column: str = "input",
    output_column: str = "output",
    messages_column: str | None = None,
    format: str | None = None,
    split_column: str | None = "split",
    type: str | None = None,
    max_samples: int | None = None,
    sample_seed: int | None = None,
    train_split: str | None = None,
    train_samples: int | None = None,
) -> None:
    """Arguments of every task over the rows of a data set.

    Args:
        data: file with the splits inside, folder with a file for each, or {split: file}.
        split: split of the rows.
        prompt: template of the user's message.
        system_prompt: system message; empty for none.
        input_column, output_column, messages_column: names of the columns.
        format, split_column, type, max_samples, sample_seed: as `data.conversations.conversations`.
        train_split, train_samples: what was trained on, and at most how many of its rows: the constant baseline (`chance`)
            knows their outputs. None, or no such split: it knows those of `split`.
    """


def takes_rows(prompt: str | None = None) -> Callable[[Callable[..., Task]], Callable[..., Task]]:
    """Give a task the arguments of `_rows` before its own; the task gets them as **rows.

    Args:
        prompt: the default of that argument, if it is another one.
    """

    def decorate(function: Callable[..., Task]) -> Callable[..., Task]:
        own = [p for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        rows = [*inspect.signature(_rows).parameters.values()]
        if prompt is not None:
            rows = [p.replace(default=prompt) if p.name == "prompt" else p for p in rows]
        signature = inspect.Signature([*rows, *own], return_annotation=Task)

        @functools.wraps(function)
        def build(*args: Any, **kwargs: Any) -> Task:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(**bound.arguments)

        build.__signature__ = signature  # type: ignore[attr-defined]
        build.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()} | {"return": Task}
        return build

    return decorate


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
    **selection: Any,
) -> Task:
    """Make a task with a sample for each row of a split; the target is the row's output.

    Of a conversation, the assistant's last turn is asked for. Each sample carries in its metadata the split, its row's
    number ("row"), and every other column of the row that is one value, for comparing groups.

    Args:
        scorer: the scorers, or what makes them from the targets; None: exact (named match: the answer is the output) and
            includes (the answer contains the output).
        config: how to decode.
        others: as `_rows`.
    Raises:
        UserError: malformed data; file, split and row are named.
    """
    columns = {"input": input_column, "output": output_column, "messages": messages_column}
    prompts: dict[str, Any] = {"prompt": prompt, "system_prompt": system_prompt}
    samples = [
        Sample(
            id=c.row,
            input=[_message(m) for m in c.messages],
            target=c.answer,
            metadata=c.columns | {"split": split, "row": c.row},
        )
        for c in read_conversations(data, split, columns, **prompts, **selection)
    ]
    if callable(scorer):
        scorer = scorer([s.target for s in samples])
    task = Task(
        dataset=MemoryDataset(samples, name=split, location=data if isinstance(data, str) else data[split]),
        solver=_ask_once(),
        scorer=scorer or [exact(case_sensitive=True), includes(case_sensitive=True)],
        config=config or GenerateConfig(),
    )
    trained = {**selection, **prompts, "column_map": columns, "split": train_split, "max_samples": train_samples}
    outputs = None if train_split is None else _outputs(data, trained)
    return with_chance(task, targets_of(task), TEST) if outputs is None else with_chance(task, outputs, TRAIN)


def _ask_once() -> Solver:
    solver = generate()
    solver.requests_per_sample = 1  # read by `run_tasks.count_requests`
    return solver


def _outputs(data: DataPath, rows: dict[str, Any]) -> Counter[str] | None:
    """Count the outputs of rows, by text; None where there are no such rows."""
    try:
        files = data if isinstance(data, str) else dict(data)
        return _count(json.dumps([files, rows], sort_keys=True), hash_data(data, rows.get("format")))
    except UserError:  # a test set may come without the training data
        return None


@functools.lru_cache(maxsize=8)
def _count(rows: str, data_hash: str) -> Counter[str]:
    """Count outputs for `_outputs`; cached, because a run builds a task several times."""
    data, selection = json.loads(rows)
    return Counter(plain(c.answer) for c in read_conversations(data, **selection))


def options_of(task: str, options: list[str] | None, **rows: Any) -> list[str]:
    """List the options of a task: those given, or the different outputs of the split, in order, numbers by their size.

    Args:
        task: its name, for the message.
        rows: arguments of `answers_task`. All rows of the split count, also those that max_samples leaves out.
    Raises:
        UserError: the split has fewer than two different outputs, or more than MOST_OPTIONS.
    """
    if options is not None:
        return [str(o) for o in options]
    texts: dict[str, str] = {}
    for sample in answers_task(**rows | {"max_samples": None, "train_split": None}).dataset:
        texts.setdefault(plain(sample.target), sample.target)
    if not 2 <= len(texts) <= MOST_OPTIONS:
        some = ", ".join(map(quote, [*texts][: 1 if redaction.is_enabled() else 3])) + (
            ", ..." if len(texts) > 3 else ""
        )
        raise UserError(
            f"eval task {task}: the outputs of split {rows['split']!r} are {len(texts)} different texts ({some}), not 2 to "
            f"{MOST_OPTIONS} options; name them, the positive one last: 'eval.task_args.{task}.options=[no,yes]', or take "
            "eval=match (texts) or eval=number"
        )
    by_size = all(text.isdecimal() for text in texts)
    return [texts[text] for text in sorted(texts, key=int if by_size else None)]


def _message(message: Message) -> ChatMessage:
    return _KINDS[message["role"]](content=message["content"])
