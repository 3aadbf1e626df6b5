"""Cells: a task answered by the adapter of an epoch, or by the untrained model. Which a result has, and which it lacks.

Imported by commands: no torch, no inspect-ai.
"""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.records.result import Evaluation, RunResult


@dataclass
class Cells:
    """What is to be evaluated: tasks of the untrained model, and (task, epoch) of the trained one.

    changed: labels of cells that the result has under other settings.
    """

    untrained: list[TaskName] = field(default_factory=list)
    trained: list[tuple[TaskName, int]] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.untrained) + len(self.trained)

    @property
    def names(self) -> list[TaskName]:
        """The tasks, each once."""
        return list({n.label: n for n in [*self.untrained, *(n for n, _ in self.trained)]}.values())

    def as_data(self) -> dict[str, list]:
        """As --json has it."""
        trained = [{"task": n.label, "epoch": e} for n, e in self.trained]
        return {"untrained": [n.label for n in self.untrained], "trained": trained}

    def in_words(self) -> str:
        """In one line."""
        trained = [f"{n.label} of epoch {e}" for n, e in self.trained]
        return ", ".join([*trained, *(f"{n.label} of the untrained model" for n in self.untrained)])


def cell_key(name: TaskName, config: RunConfig) -> str:
    """What an evaluation depends on besides the model and the data, as 16 hex digits."""
    chosen, data = config.eval, config.dataset
    identity = [str(name), chosen.arguments_of(name), chosen.max_tokens, chosen.limit]
    identity += [chosen.logprobs, chosen.top_logprobs]
    if name.ships:
        identity += [name.split or data.test_split, data.max_test_samples, data.sample_seed]
    if name.file is not None and name.file.is_file():
        identity.append(hashlib.sha256(name.file.read_bytes()).hexdigest())
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]


def missing_cells(config: RunConfig, result: RunResult, logs: Path) -> Cells:
    """The cells that a config asks for and a result does not have; one whose log is gone counts as missing.

    Args:
        logs: the run's folder of logs.
    """
    cells = Cells()
    for name in config.eval.names:
        key = cell_key(name, config)
        if config.eval.baseline and not _has(result.baseline, name.label, None, key, logs / "untrained", cells):
            cells.untrained.append(name)
    for epoch in config.evaluated_epochs:
        for name in config.eval.names:
            if not _has(result.evaluation, name.label, epoch, cell_key(name, config), logs, cells):
                cells.trained.append((name, epoch))
    return cells


def _has(made: list[Evaluation], label: str, epoch: int | None, key: str, logs: Path, cells: Cells) -> bool:
    for e in made:
        if (e.task, e.epoch) == (label, epoch) and (logs / Path(e.log).name).is_file():
            if e.key != key:
                cells.changed.append(label if epoch is None else f"{label} of epoch {epoch}")
            return e.key == key
    return False


def with_cell(made: list[Evaluation], new: Evaluation) -> list[Evaluation]:
    """The cells with a new one in its place, an older one of the same task and epoch gone: by task in the order in which
    tasks came, then by epoch.
    """
    kept = [e for e in made if (e.task, e.epoch) != (new.task, new.epoch)]
    order = list(dict.fromkeys([*(e.task for e in made), new.task]))
    return sorted([*kept, new], key=lambda e: (order.index(e.task), e.epoch or 0))
