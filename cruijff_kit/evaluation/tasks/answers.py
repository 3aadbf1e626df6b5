"""What tasks with one right answer per row share: samples worded exactly as in training, scored by match and includes."""

from inspect_ai import Task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.model import ChatMessage, ChatMessageSystem, ChatMessageUser
from inspect_ai.scorer import includes, match
from inspect_ai.solver import generate

from cruijff_kit.data.instruct import Message, conversations


def answers_task(data: str, split: str, prompt: str, system_prompt: str, input_column: str, output_column: str) -> Task:
    """A task that asks each row of a split and scores the answer against the row's output.

    match: the answer is the output, exactly. includes: the output stands somewhere in the answer. Both mind the case.
    Each sample carries its row's number in metadata["row"].

    Raises:
        UserError: malformed data; file, split and row are named.
    """
    columns = {"input": input_column, "output": output_column}
    samples = [
        Sample(id=row, input=[_message(m) for m in c.messages], target=c.answer, metadata={"split": split, "row": row})
        for row, c in enumerate(conversations(data, split, columns, prompt, system_prompt))
    ]
    return Task(
        dataset=MemoryDataset(samples, name=split, location=data),
        solver=generate(),
        scorer=[match(location="exact", ignore_case=False), includes(ignore_case=False)],
    )


def _message(message: Message) -> ChatMessage:
    kind = ChatMessageSystem if message["role"] == "system" else ChatMessageUser
    return kind(content=message["content"])
