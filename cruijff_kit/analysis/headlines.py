"""Which metric of a scorer tables show, and which are compared."""

from cruijff_kit.analysis.measures import measure
from cruijff_kit.records.result import Evaluation, RunResult


def list_scorers(results: list[RunResult]) -> list[tuple[str, str]]:
    """(task, scorer) in the order in which they come."""
    return list(dict.fromkeys((e.task, s) for e in _cells(results) for s in e.metrics))


def pick_headline(results: list[RunResult], task: str, scorer: str) -> str:
    """Accuracy, else a scorer's first metric (of those that can be compared, if it has any); AUC where an earlier scorer of
    the task has an accuracy.
    """
    of_task = [e.metrics for e in _cells(results) if e.task == task and scorer in e.metrics]
    for metrics in of_task:
        earlier = [values for name, values in metrics.items() if [*metrics].index(name) < [*metrics].index(scorer)]
        if "auc" in metrics[scorer] and any("accuracy" in values for values in earlier):
            return "auc"
    names = next((list(values) for metrics in of_task if (values := metrics[scorer])), [])
    comparable = [name for name in names if measure(name)]
    return "accuracy" if "accuracy" in names else next(iter([*comparable, *names]), "")


def _cells(results: list[RunResult]) -> list[Evaluation]:
    return [e for r in results for e in (*r.evaluation, *r.baseline)]
