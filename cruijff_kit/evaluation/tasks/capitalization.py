"""Capitalisation: a word is given, the same word with a capital letter is wanted."""

from typing import Any

from inspect_ai import Task, task

from cruijff_kit.evaluation.tasks.common import answers_task, takes_rows


@task
@takes_rows(prompt="Capitalize the word: {input}")
def capitalization(**rows: Any) -> Task:
    """Does the model write the word with a capital letter?"""
    return answers_task(**rows)
