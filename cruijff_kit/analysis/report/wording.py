"""What numbers are over, and how they were tested, in plain words: test samples, or respondents where these are known."""

from collections.abc import Iterable

from cruijff_kit.analysis.estimates import Estimate
from cruijff_kit.analysis.power import DetectableDifference
from cruijff_kit.analysis.rankings import Ranking
from cruijff_kit.analysis.report.load import Runs
from cruijff_kit.records.result import RunResult
from cruijff_kit.util.format import format_number

SAMPLES, ROWS = "test samples", "validation rows"
_TESTS = {
    "McNemar, exact": "McNemar's exact test",
    "items and seeds as crossed random effects, t": "t test with {} and seeds as crossed random effects",
    "studentised bootstrap over items": "studentised bootstrap over {}",
    "paired t over items": "paired t test over {}",
    "no item differs": "no test: all {} differ by the same",
}


def units_of(results: Iterable[RunResult], of_validation: bool = False) -> str:
    """What an interval is over: "respondents", by the column that names whom each sample is of; else "test samples".

    Args:
        of_validation: of validation losses: "respondents of the validation split", or "validation rows".
    """
    columns = {r.unit_column for r in results}
    if columns <= {None}:
        return ROWS if of_validation else SAMPLES
    name = _plural(columns.pop()) if len(columns) == 1 else "units"
    return f"{name} of the validation split" if of_validation else name


def _plural(column: str) -> str:
    """ "respondents" of respondent, "countries" of country; "different hh_id" of what is no word."""
    if not column.isalpha() or not column.islower():
        return f"different {column}"
    if column.endswith("y") and column[-2:-1] not in "aeiou":
        return f"{column[:-1]}ies"
    return column if column.endswith("s") else f"{column}s"


def over_in_words(over: str, units: str) -> str:
    """ "respondents and seeds" of an estimate's "test items and seeds"."""
    return over.replace("test items", units).replace("validation rows", units)


def range_in_words(e: Estimate | None) -> str | None:
    """ "[0.756, 0.899]"; None without an interval."""
    return None if e is None or e.low is None else f"[{format_number(e.low)}, {format_number(e.high)}]"


def test_in_words(method: str, units: str) -> str:
    """A comparison's test, or why there is none."""
    return _TESTS.get(method, method).format(units)


def percent(level: float) -> str:
    """ "98.33%" of 0.98333."""
    return f"{100 * level:.4g}%"


def selection_in_words(ranking: Ranking) -> str:
    """What to know of the best one's scores on the split that chose it."""
    return (
        f"chosen out of {len(ranking.configurations)} on the {ranking.split} split, on which its scores are thus likely "
        "too good; their intervals, and those of configurations that cannot be distinguished from it, are wider for that "
        f"({percent(ranking.level)} instead of 95%, Bonferroni)"
    )


def detectable_differences(runs: Runs) -> list[str]:
    """A sentence a task: the smallest difference that would have been found."""
    units = units_of(r for c in runs.analysis.configurations for r in c.runs)
    return [_detectable(task, d, units) for task, d in runs.analysis.detectable.items()]


def _detectable(task: str, d: DetectableDifference, units: str) -> str:
    of = f"{d.items:,} {SAMPLES}"
    if d.design_effect > 1:
        of += f", which tell as much as {d.items / d.design_effect:.0f} of as many {units} would,"
    of = f"{of} and {d.seeds} seeds of each configuration" if d.seeds > 1 else of.removesuffix(",")
    if d.difference is None:
        found = "no difference in accuracy, however large, would be found"
    elif d.accuracy is None:
        unit = d.unit.replace("as scored", "").replace("an item's", "a sample's")
        found = f"a difference in the mean error of {f'{d.difference:.3g} {unit}'.strip()} would be found"
    else:
        found = f"a difference of {100 * d.difference:.1f} points of accuracy would be found"
    compared = f", with p corrected for {d.configurations} configurations" if d.configurations > 2 else ""
    accuracy = "" if d.accuracy is None else f"an accuracy of {d.accuracy:.2f} and "
    about = "as observed here" if d.observed else "assumed, since these runs do not tell"
    needs = "more than a million" if d.items_for_5_points is None else f"{d.items_for_5_points:,}"
    return (
        f"On {task}, with {of}, {found} with a probability of 80%{compared} (for {accuracy}answers of two configurations "
        f"that correlate by {d.correlation:.2f}, {about})"
        + ("." if d.accuracy is None else f"; 5 points would need {needs} {SAMPLES}.")
    )
