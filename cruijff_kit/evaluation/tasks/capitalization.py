"""Capitalisation: a word is given, the same word with a capital letter is wanted."""

from inspect_ai import Task, task

from cruijff_kit.data.dataset_files import DataPath
from cruijff_kit.evaluation.tasks.common import answers_task


@task
def capitalization(
    data: DataPath,
    split: str = "test",
    prompt: str = "Capitalize the word: {input}",
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
) -> Task:
    """Does the model write the word with a capital letter?

    Args:
        data: JSON file with splits, as the capitalization generator writes it.
        split: the split to ask.
        prompt: template of the user's message.
        system_prompt: system message; empty for none.
        input_column, output_column, messages_column: names of the columns.
        format, split_column, type, max_samples, sample_seed: as `data.conversations.conversations`.
        train_split, train_samples: what was trained on (`answers_task`).
    """
    return answers_task(
        data, split, prompt, system_prompt, input_column, output_column, messages_column,
        format=format, split_column=split_column, type=type, max_samples=max_samples, sample_seed=sample_seed,
        train_split=train_split, train_samples=train_samples,
    )  # fmt: skip
