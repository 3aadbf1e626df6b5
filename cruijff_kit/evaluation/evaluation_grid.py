"""Which evaluations a result has, and which it lacks: a task answered by the adapter of an epoch, or by the base model.

Commands import it: no torch, no inspect-ai.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.records.result import Evaluation, RunResult
from cruijff_kit.records.run_folder import RunFolder


@dataclass
class EvaluationGrid:
    """Evaluations to run."""

    base_model: list[TaskName] = field(default_factory=list)
    """Tasks of the base model."""
    trained: list[tuple[TaskName, int]] = field(default_factory=list)
    """Task and epoch of the trained model."""
    changed: list[str] = field(default_factory=list)
    """Labels of evaluations that the result has under other settings."""

    def __len__(self) -> int:
        return len(self.base_model) + len(self.trained)

    @property
    def names(self) -> list[TaskName]:
        """Tasks without duplicates."""
        return list({n.label: n for n in [*self.base_model, *(n for n, _ in self.trained)]}.values())

    def to_dict(self) -> dict[str, list]:
        """Return the grid as in --json."""
        trained = [{"task": n.label, "epoch": e} for n, e in self.trained]
        return {"base_model": [n.label for n in self.base_model], "trained": trained}

    def summary(self) -> str:
        """Name all in one line."""
        trained = [f"{n.label} of epoch {e}" for n, e in self.trained]
        return ", ".join([*trained, *(f"{n.label} of the base model" for n in self.base_model)])


def item_key(name: TaskName, config: RunConfig) -> str:
    """Hash what an evaluation depends on besides the model and the data; 16 hex digits."""
    settings, data = config.eval, config.dataset
    identity = [str(name), settings.arguments_of(name), settings.max_tokens, settings.limit]
    identity += [settings.logprobs, settings.top_logprobs]
    if name.ships:
        identity += [name.split or data.test_split, data.max_test_samples, data.sample_seed]
    if name.file is not None and name.file.is_file():
        identity.append(hashlib.sha256(name.file.read_bytes()).hexdigest())
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def find_missing(config: RunConfig, result: RunResult, folder: RunFolder) -> EvaluationGrid:
    """Find the evaluations in a config that a result lacks; one whose log is gone counts as missing.

    Args:
        folder: the run's, with its logs.
    """
    grid = EvaluationGrid()
    for name in config.eval.names:
        key = item_key(name, config)
        if config.eval.baseline and not _has(result.baseline, name.label, None, key, folder.base_model_eval, grid):
            grid.base_model.append(name)
    for epoch in config.evaluated_epochs:
        for name in config.eval.names:
            if not _has(result.evaluation, name.label, epoch, item_key(name, config), folder.eval, grid):
                grid.trained.append((name, epoch))
    return grid


def _has(
    evaluations: list[Evaluation], label: str, epoch: int | None, key: str, logs: Path, grid: EvaluationGrid
) -> bool:
    for e in evaluations:
        if (e.task, e.epoch) == (label, epoch) and (logs / Path(e.log).name).is_file():
            if e.key != key:
                grid.changed.append(label if epoch is None else f"{label} of epoch {epoch}")
            return e.key == key
    return False


def with_evaluation(evaluations: list[Evaluation], new: Evaluation) -> list[Evaluation]:
    """Add an evaluation, in the place of an older one of the same task and epoch. They are sorted by task, in the order in
    which tasks came, then by epoch.
    """
    kept_evaluations = [e for e in evaluations if (e.task, e.epoch) != (new.task, new.epoch)]
    order = list(dict.fromkeys([*(e.task for e in evaluations), new.task]))
    return sorted([*kept_evaluations, new], key=lambda e: (order.index(e.task), e.epoch or 0))
