"""What tasks over the rows of a data set share: samples worded exactly as in training, and the scorers they choose."""

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
from inspect_ai.scorer import Scorer, includes, match
from inspect_ai.solver import generate

from cruijff_kit.data.conversations import Message, conversations
from cruijff_kit.data.layouts import DataPath
from cruijff_kit.errors import UserError
from cruijff_kit.withheld import active, quoted

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
    scorer: list[Scorer] | None = None,
    config: GenerateConfig | None = None,
    **chosen: Any,
) -> Task:
    """A task that asks each row of a split; the target is the row's output.

    Of a conversation, the assistant's last turn is asked for. Each sample carries in its metadata the split, its row's
    number ("row"), and every other column of the row that is one value, for comparing groups.

    Args:
        scorer: None: match (the answer is the output, exactly) and includes (the output stands somewhere in the answer);
            both mind the case.
        config: how to decode.
        chosen: format, split_column, type, max_samples, sample_seed of `conversations`.
    Raises:
        UserError: malformed data; file, split and row are named.
    """
    columns = {"input": input_column, "output": output_column, "messages": messages_column}
    samples = [
        Sample(
            id=c.row,
            input=[_message(m) for m in c.messages],
            target=c.answer,
            metadata=c.columns | {"split": split, "row": c.row},
        )
        for c in conversations(data, split, columns, prompt, system_prompt, **chosen)
    ]
    return Task(
        dataset=MemoryDataset(samples, name=split, location=data if isinstance(data, str) else data[split]),
        solver=generate(),
        scorer=scorer or [exact(), includes(ignore_case=False)],
        config=config or GenerateConfig(),
    )


def exact() -> Scorer:
    """inspect-ai's match: the answer is the output, exactly."""
    return match(location="exact", ignore_case=False)


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
    for sample in answers_task(**rows | {"max_samples": None}).dataset:
        found.setdefault(sample.target.strip(), sample.target)
    if not 2 <= len(found) <= MOST_OPTIONS:
        some = ", ".join(map(quoted, [*found][: 1 if active() else 3])) + (", ..." if len(found) > 3 else "")
        raise UserError(
            f"eval task {task}: the outputs of split {rows['split']!r} are {len(found)} different texts ({some}), not 2 to "
            f"{MOST_OPTIONS} options; name them, the positive one last: 'eval.task_args.{task}.options=[no,yes]', or take "
            "eval=match (texts) or eval=number"
        )
    by_size = all(text.isdecimal() for text in found)
    return [found[text] for text in sorted(found, key=int if by_size else None)]


def _message(message: Message) -> ChatMessage:
    return _KINDS[message["role"]](content=message["content"])
