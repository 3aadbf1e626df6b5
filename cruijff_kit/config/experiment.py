"""The experiment node: what a sweep is for, in words. conf/experiment/*.yaml set it together with what is swept."""

import re
from dataclasses import dataclass

from omegaconf import MISSING

from cruijff_kit.config.checks import require


@dataclass
class ExperimentConfig:
    """What a sweep is for. Nothing is computed from it; the summary and the report show it."""

    name: str = MISSING
    """Folder under multirun/; runs of one experiment are compared and never made twice."""
    question: str = ""
    """What the sweep is to answer."""
    hypothesis: str = ""
    """What is expected, and why."""
    evaluation: str = ""
    """The evaluation plan: what will be compared with what, by which metric."""

    def __post_init__(self) -> None:
        require(
            not re.search(r"[/\\]", self.name) and self.name not in ("", ".", ".."),
            f"experiment.name={self.name} must be the name of one folder, without / or \\",
        )
