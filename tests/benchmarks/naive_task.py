"""The capitalisation task as one would write it for `inspect eval`; it asks what our task of that name asks."""

import json
from pathlib import Path

from inspect_ai import Task, task
from inspect_ai.dataset import MemoryDataset, Sample
from inspect_ai.scorer import includes, match
from inspect_ai.solver import generate


@task
def capitalization(data: str, split: str, prompt: str) -> Task:
    """Answers to a split of a JSON file, scored by match and includes.

    Args:
        data: JSON file with splits of rows.
        split: the split to ask.
        prompt: the user's message, with {input} for the word.
    """
    rows = json.loads(Path(data).read_text(encoding="utf-8"))[split]
    samples = [Sample(input=prompt.replace("{input}", row["input"]), target=row["output"]) for row in rows]
    return Task(
        dataset=MemoryDataset(samples),
        solver=generate(),
        scorer=[match(location="exact", ignore_case=False), includes(ignore_case=False)],
    )
