"""The headline of a scorer: the metric that tables show and that configurations are compared by."""

from cruijff_kit.analysis.measures import find_measure
from cruijff_kit.records.result import Evaluation, RunResult


def list_scorers(results: list[RunResult]) -> list[tuple[str, str]]:
    """List (task, scorer) in the order of their first occurrence."""
    return list(dict.fromkeys((e.task, s) for e in _list_evaluations(results) for s in e.metrics))


def pick_headline(results: list[RunResult], task: str, scorer: str) -> str:
    """Return the headline of a scorer: accuracy, or else its first metric that can be compared, or else its first one; AUC
    where an earlier scorer of the task has an accuracy.
    """
    scorers = [e.metrics for e in _list_evaluations(results) if e.task == task and scorer in e.metrics]
    for metrics in scorers:
        names = [*metrics]
        predecessors = names[: names.index(scorer)]
        if "auc" in metrics[scorer] and any("accuracy" in metrics[name] for name in predecessors):
            return "auc"
    names = next((list(values) for metrics in scorers if (values := metrics[scorer])), [])
    comparable = [name for name in names if find_measure(name)]
    return "accuracy" if "accuracy" in names else next(iter([*comparable, *names]), "")


def _list_evaluations(results: list[RunResult]) -> list[Evaluation]:
    return [e for r in results for e in (*r.evaluation, *r.baseline)]
