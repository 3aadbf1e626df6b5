"""What the entries of eval.tasks mean. Imported at start-up: no inspect-ai.

match               a task that ships, on the dataset's test split
match@SPLIT         the same on another split
sums.py@sums        a task in a file of the user's
package/task        a task of an installed package (its entry point in the group inspect_ai)
"""

from dataclasses import dataclass
from pathlib import Path

from cruijff_kit.util.errors import UserError


@dataclass(frozen=True)
class TaskName:
    """An entry of eval.tasks."""

    label: str
    """Its name in results."""
    task: str
    """The name of the function (package/task for an installed one)."""
    split: str | None = None
    """Of a task that ships; None for dataset.test_split."""
    file: Path | None = None
    """Of a task in a file."""

    @property
    def ships(self) -> bool:
        """Whether it is one of ours, which asks the run's own data set."""
        return self.file is None and "/" not in self.task

    def __str__(self) -> str:
        return f"{self.file}@{self.task}" if self.file else self.label if self.ships else self.task


def task_name(entry: str) -> TaskName:
    """Read an entry of eval.tasks.

    Raises:
        UserError: it is none.
    """
    left, at, right = entry.rpartition("@")
    if entry.endswith(".py"):
        raise UserError(f"eval.tasks: {entry} is a file; name the task in it: {entry}@TASK")
    if at and not (left and right):
        raise UserError(f"eval.tasks: {entry} is not a task; write NAME, NAME@SPLIT, FILE.py@TASK or PACKAGE/TASK")
    if left.endswith(".py"):
        return TaskName(right, right, file=Path(left).expanduser().absolute())
    name = (left or right).removeprefix("cruijff_kit/")
    if "/" in name:
        if at:
            raise UserError(f"eval.tasks: {entry}: @SPLIT works for shipped tasks; for a file write FILE.py@TASK")
        return TaskName(name.rpartition("/")[2], name)
    return TaskName(f"{name}@{right}" if at else name, name, split=right if at else None)


def task_names(entries: list[str]) -> list[TaskName]:
    """The entries of eval.tasks.

    Raises:
        UserError: one that is none, or two that results would call the same.
    """
    names = [task_name(entry) for entry in entries]
    for i, name in enumerate(names):
        if name.label in [earlier.label for earlier in names[:i]]:
            raise UserError(f"eval.tasks names two tasks that are called {name.label}; rename one of them")
    return names
