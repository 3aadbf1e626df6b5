"""Settings and other values of all runs, in words. Called by methods."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from cruijff_kit.analysis.configurations import is_finite
from cruijff_kit.analysis.report.document import format_value, join_words
from cruijff_kit.analysis.report.load import ReportRun

_FEW = 6  # values that are listed; more numbers are given as a range
_AnyRun = TypeVar("_AnyRun", bound=ReportRun)


def distinct_values(runs: Iterable[_AnyRun], read: Callable[[_AnyRun], Any]) -> list[Any]:
    """Return the distinct values that `read` finds in the runs, numbers sorted; None and "" are dropped."""
    value_by_text: dict[str, Any] = {}
    for run in runs:
        value = read(run)
        if value is not None and value != "":
            value_by_text.setdefault(repr(value), value)
    values = [*value_by_text.values()]
    return sorted(values) if all(is_finite(v) for v in values) else values


def format_values(values: list[Any]) -> str:
    """Format values: "8", "8 or 16", or "between 0.0001 and 0.01 (40 values)"."""
    if len(values) > _FEW and all(is_finite(v) for v in values):
        return f"between {format_value(values[0])} and {format_value(values[-1])} ({len(values)} values)"
    return join_words([format_value(v) for v in values], "or")


def read_setting(run: ReportRun, path: str) -> Any:
    """Return a value of the run's config by its dotted path, or the value that a retry set; None if there is none."""
    if run.result and path in run.result.changes:
        return run.result.changes[path]
    tree: Any = run.config
    for key in path.split("."):
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def read_first_setting(run: ReportRun, *paths: str) -> Any:
    """Return the first setting that the config has, given its paths in config.yaml and in torchtune.yaml."""
    return next((value for path in paths if (value := read_setting(run, path)) is not None), None)
