"""Any data set with one right answer per row."""

from typing import Any

from inspect_ai import Task, task

from cruijff_kit.evaluation.tasks.common import answers_task, takes_rows


@task
@takes_rows()
def match(**rows: Any) -> Task:
    """Does the model give the row's output?"""
    return answers_task(**rows)
