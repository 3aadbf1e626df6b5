"""A data set whose outputs are numbers: how far from them the answers are."""

from typing import Any

from inspect_ai import Task, task

from cruijff_kit.evaluation.numbers import writes_decimal_comma
from cruijff_kit.evaluation.scorers import continuous_scorer
from cruijff_kit.evaluation.tasks.common import answers_task, takes_rows


@task
@takes_rows()
def number(**rows: Any) -> Task:
    """How far is the number in the answer from the row's output?"""
    return answers_task(**rows, scorer=lambda targets: [continuous_scorer(writes_decimal_comma(targets))])
