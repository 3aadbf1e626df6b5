"""Define the facts about an evaluation that are known before it starts."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EvaluationPlan:
    """Inputs of an evaluation."""

    data_hash: str
    """Identity of the data."""
    prompts_checked: dict[str, int]
    """Task -> how many of its prompts were compared with training."""
