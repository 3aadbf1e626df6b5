"""A data set whose outputs are a few labels: which one is written, and how likely the model holds each."""

from typing import Any

from inspect_ai import Task, task
from inspect_ai.model import GenerateConfig

from cruijff_kit.data.dataset_files import DataPath
from cruijff_kit.evaluation.scorers import exact, numeric_risk_scorer, risk_scorer
from cruijff_kit.evaluation.tasks.common import MOST_OPTIONS, answers_task, options_of


@task
def risk(
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
    options: list[str] | None = None,
) -> Task:
    """Which label does the model write (match), and how likely does it hold each (risk_scorer)?

    Args:
        data: file with the splits inside, folder with a file for each, or {split: file}.
        split: the split to ask.
        prompt: template of the user's message.
        system_prompt: system message; empty for none.
        input_column, output_column, messages_column: names of the columns.
        format, split_column, type, max_samples, sample_seed: as `data.conversations.conversations`.
        train_split, train_samples: what was trained on (`answers_task`).
        options: the labels, each a single token, the positive one last; None: the different outputs of the split, in order.
    Raises:
        UserError: malformed data, or outputs that are no such labels.
    """
    rows: dict[str, Any] = dict(
        data=data, split=split, prompt=prompt, system_prompt=system_prompt, input_column=input_column,
        output_column=output_column, messages_column=messages_column, format=format, split_column=split_column, type=type,
        max_samples=max_samples, sample_seed=sample_seed, train_split=train_split, train_samples=train_samples,
    )  # fmt: skip
    labels = options_of("risk", options, **rows)
    likely = GenerateConfig(logprobs=True, top_logprobs=MOST_OPTIONS)
    return answers_task(**rows, scorer=[exact(case_sensitive=True), risk_scorer(labels)], config=likely)


@task
def numeric_risk(
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
    options: list[str] | None = None,
    threshold: float = 0.5,
) -> Task:
    """How likely does the model say, as a number from 0 to 1, that the positive label is?

    Args:
        data: file with the splits inside, folder with a file for each, or {split: file}.
        split: the split to ask.
        prompt: template of the user's message.
        system_prompt: system message; empty for none.
        input_column, output_column, messages_column: names of the columns.
        format, split_column, type, max_samples, sample_seed: as `data.conversations.conversations`.
        train_split, train_samples: what was trained on (`answers_task`).
        options: the two labels, the positive one last; None: the different outputs of the split, in order.
        threshold: from this risk on the positive one counts as predicted.
    Raises:
        UserError: malformed data, or outputs that are not two labels.
    """
    rows: dict[str, Any] = dict(
        data=data, split=split, prompt=prompt, system_prompt=system_prompt, input_column=input_column,
        output_column=output_column, messages_column=messages_column, format=format, split_column=split_column, type=type,
        max_samples=max_samples, sample_seed=sample_seed, train_split=train_split, train_samples=train_samples,
    )  # fmt: skip
    return answers_task(**rows, scorer=[numeric_risk_scorer(options_of("numeric_risk", options, **rows), threshold)])
