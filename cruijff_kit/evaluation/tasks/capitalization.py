"""Capitalisation: a word is given, the same word with a capital letter is wanted."""

from inspect_ai import Task, task

from cruijff_kit.evaluation.tasks.answers import answers_task


@task
def capitalization(
    data: str,
    split: str = "test",
    prompt: str = "Capitalize the word: {input}",
    system_prompt: str = "",
    input_column: str = "input",
    output_column: str = "output",
) -> Task:
    """Does the model write the word with a capital letter?

    Args:
        data: JSON file with splits, as the capitalization generator writes it.
        split: the split to ask.
        prompt: template of the user's message.
        system_prompt: system message; empty for none.
        input_column, output_column: names of the columns.
    """
    return answers_task(data, split, prompt, system_prompt, input_column, output_column)
