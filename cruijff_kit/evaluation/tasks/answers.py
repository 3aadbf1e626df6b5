"""What tasks with one right answer per row share: samples worded exactly as in training, scored by match and includes."""

from typing import Any

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageAssistant, ChatMessageSystem, ChatMessageUser
from inspect_ai.scorer import includes, match
from inspect_ai.solver import generate

from cruijff_kit.data.conversations import Message, conversations
from cruijff_kit.data.layouts import DataPath

_KINDS = {"system": ChatMessageSystem, "user": ChatMessageUser, "assistant": ChatMessageAssistant}


def answers_task(
    data: DataPath,
    split: str,
    prompt: str,
    system_prompt: str,
    input_column: str,
    output_column: str,
    messages_column: str | None = None,
    **chosen: Any,
) -> Task:
    """A task that asks each row of a split and scores the answer against the row's output.

    match: the answer is the output, exactly. includes: the output stands somewhere in the answer. Both mind the case.
    Of a conversation, the assistant's last turn is asked for. Each sample carries its row's number in metadata["row"].

    Args:
        chosen: format, split_column, type, max_samples, sample_seed of `conversations`.
    Raises:
        UserError: malformed data; file, split and row are named.
    """
    columns = {"input": input_column, "output": output_column, "messages": messages_column}
    samples = [
        Sample(
            id=c.row, input=[_message(m) for m in c.messages], target=c.answer, metadata={"split": split, "row": c.row}
        )
        for c in conversations(data, split, columns, prompt, system_prompt, **chosen)
    ]
    return Task(
        dataset=MemoryDataset(samples, name=split, location=data if isinstance(data, str) else data[split]),
        solver=generate(),
        scorer=[match(location="exact", ignore_case=False), includes(ignore_case=False)],
    )


def _message(message: Message) -> ChatMessage:
    return _KINDS[message["role"]](content=message["content"])
