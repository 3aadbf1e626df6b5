"""A data set whose outputs are a few labels: which one is written, and how likely the model holds each."""

from typing import Any

from inspect_ai import Task, task
from inspect_ai.model import GenerateConfig

from cruijff_kit.evaluation.scorers import exact, numeric_risk_scorer, risk_scorer
from cruijff_kit.evaluation.tasks.common import MOST_OPTIONS, answers_task, options_of, takes_rows


@task
@takes_rows()
def risk(options: list[str] | None = None, **rows: Any) -> Task:
    """Which label does the model write (match), and how likely does it hold each (risk_scorer)?

    Args:
        options: the labels, each a single token, the positive one last; None: the different outputs of the split, in order.
    Raises:
        UserError: malformed data, or outputs that are no such labels.
    """
    labels = options_of("risk", options, **rows)
    likely = GenerateConfig(logprobs=True, top_logprobs=MOST_OPTIONS)
    return answers_task(**rows, scorer=[exact(case_sensitive=True), risk_scorer(labels)], config=likely)


@task
@takes_rows()
def numeric_risk(options: list[str] | None = None, threshold: float = 0.5, **rows: Any) -> Task:
    """How likely does the model say, as a number from 0 to 1, that the positive label is?

    Args:
        options: the two labels, the positive one last; None: the different outputs of the split, in order.
        threshold: from this risk on the positive one counts as predicted.
    Raises:
        UserError: malformed data, or outputs that are not two labels.
    """
    return answers_task(**rows, scorer=[numeric_risk_scorer(options_of("numeric_risk", options, **rows), threshold)])
