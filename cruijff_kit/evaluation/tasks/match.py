"""Any data set with one right answer per row."""

from inspect_ai import Task, task

from cruijff_kit.evaluation.tasks.answers import answers_task


@task
def match(
    data: str,
    split: str = "test",
    prompt: str = "{input}\n",
    system_prompt: str = "",
    input_column: str = "input",
    output_column: str = "output",
) -> Task:
    """Does the model give the row's output?

    Args:
        data: JSON file with splits.
        split: the split to ask.
        prompt: template of the user's message.
        system_prompt: system message; empty for none.
        input_column, output_column: names of the columns.
    """
    return answers_task(data, split, prompt, system_prompt, input_column, output_column)
