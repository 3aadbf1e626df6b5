"""What is the same in all runs and what varies, in words. Called by methods."""

from collections.abc import Callable, Iterable
from typing import Any

from cruijff_kit.analysis.report.document import listed, shown
from cruijff_kit.analysis.report.load import Run, finite

_FEW = 6  # values that are listed; of more numbers the range is given


def each(runs: Iterable[Run], read: Callable[[Run], Any]) -> list[Any]:
    """The different values of something over the runs, in order; those that do not have it left out."""
    found: dict[str, Any] = {}
    for run in runs:
        value = read(run)
        if value is not None and value != "":
            found.setdefault(repr(value), value)
    values = [*found.values()]
    return sorted(values) if all(finite(v) for v in values) else values


def worded(values: list[Any]) -> str:
    """ "8", "8 or 16", or "between 0.0001 and 0.01 (40 values)"."""
    if len(values) > _FEW and all(finite(v) for v in values):
        return f"between {shown(values[0])} and {shown(values[-1])} ({len(values)} values)"
    return listed([shown(v) for v in values], "or")


def setting(run: Run, path: str) -> Any:
    """A value of the run's config by its dotted path; None where it has none. What retries changed comes first."""
    if run.result and path in run.result.changes:
        return run.result.changes[path]
    tree: Any = run.config
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def either(run: Run, *paths: str) -> Any:
    """The first of these settings that the config has (config.yaml, then torchtune.yaml's name of it)."""
    return next((value for path in paths if (value := setting(run, path)) is not None), None)
