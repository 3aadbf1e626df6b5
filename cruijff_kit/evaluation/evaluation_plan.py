"""What an evaluation comes to, before it starts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationPlan:
    """What evaluation builds on: the data's identity, and task -> prompts compared with training."""

    data_hash: str
    prompts_checked: dict[str, int]
