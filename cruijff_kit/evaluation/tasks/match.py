"""Any data set with one right answer per row."""

from inspect_ai import Task, task

from cruijff_kit.data.dataset_files import DataPath
from cruijff_kit.evaluation.tasks.common import answers_task


@task
def match(
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
) -> Task:
    """Does the model give the row's output?

    Args:
        data: file with the splits inside, folder with a file for each, or {split: file}.
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
