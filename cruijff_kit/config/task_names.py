"""Parse the entries of eval.tasks. Imported at start-up: no inspect-ai.

match               a task of cruijff_kit, on the dataset's test split
match@SPLIT         the same task on another split
sums.py@sums        a task in a user's file
package/task        a task of an installed package (its entry point in the group inspect_ai)
"""

from dataclasses import dataclass
from pathlib import Path

from cruijff_kit.util.errors import UserError


@dataclass(frozen=True)
class TaskName:
    """An entry of eval.tasks."""

    label: str
    """Name of the task in results."""
    task: str
    """Name of the task's function; package/task for an installed task."""
    split: str | None = None
    """Split that a task of cruijff_kit evaluates; None: dataset.test_split."""
    file: Path | None = None
    """File of a user's task; None for other tasks."""

    @property
    def ships(self) -> bool:
        """Return whether this is a task of cruijff_kit, which evaluates the run's own data set."""
        return self.file is None and "/" not in self.task

    def __str__(self) -> str:
        return f"{self.file}@{self.task}" if self.file else self.label if self.ships else self.task


def parse_task_name(entry: str) -> TaskName:
    """Parse an entry of eval.tasks.

    Raises:
        UserError: the entry is malformed.
    """
    head, at_sign, tail = entry.rpartition("@")
    if entry.endswith(".py"):
        raise UserError(f"eval.tasks: {entry} is a file; name the task in it: {entry}@TASK")
    if at_sign and not (head and tail):
        raise UserError(f"eval.tasks: {entry} is not a task; write NAME, NAME@SPLIT, FILE.py@TASK or PACKAGE/TASK")
    if head.endswith(".py"):
        return TaskName(tail, tail, file=Path(head).expanduser().absolute())
    name = (head or tail).removeprefix("cruijff_kit/")
    if "/" in name:
        if at_sign:
            raise UserError(f"eval.tasks: {entry}: @SPLIT works for shipped tasks; for a file write FILE.py@TASK")
        return TaskName(name.rpartition("/")[2], name)
    return TaskName(f"{name}@{tail}" if at_sign else name, name, split=tail if at_sign else None)


def parse_task_names(entries: list[str]) -> list[TaskName]:
    """Parse the entries of eval.tasks.

    Raises:
        UserError: an entry is malformed, or two tasks have the same name in results.
    """
    names = [parse_task_name(entry) for entry in entries]
    for i, name in enumerate(names):
        if name.label in [earlier.label for earlier in names[:i]]:
            raise UserError(f"eval.tasks names two tasks that are called {name.label}; rename one of them")
    return names
