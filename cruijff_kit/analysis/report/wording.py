"""Words for units (test samples, or respondents where these are known), tests, and the choice of the best."""

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


def name_units(results: Iterable[RunResult], is_validation: bool = False) -> str:
    """Name the units that an interval is over: "respondents", after the unit column; without one, "test samples".

    Args:
        is_validation: for validation losses: "respondents of the validation split", or "validation rows".
    """
    columns = {r.unit_column for r in results}
    names = [column for column in columns if column is not None]
    if not names:
        return ROWS if is_validation else SAMPLES
    name = _plural(names[0]) if len(columns) == 1 else "units"
    return f"{name} of the validation split" if is_validation else name


def _plural(column: str) -> str:
    """Return "respondents" for respondent, "countries" for country, and "different hh_id" for what is not a word."""
    if not column.isalpha() or not column.islower():
        return f"different {column}"
    if column.endswith("y") and column[-2:-1] not in "aeiou":
        return f"{column[:-1]}ies"
    return column if column.endswith("s") else f"{column}s"


def name_population(population: str, units: str) -> str:
    """Put the units into an estimate's population: "respondents and seeds" for "test items and seeds"."""
    return population.replace("test items", units).replace("validation rows", units)


def format_interval(e: Estimate | None) -> str | None:
    """Format an interval: "[0.756, 0.899]"; None without an interval."""
    return (
        None if e is None or e.low is None or e.high is None else f"[{format_number(e.low)}, {format_number(e.high)}]"
    )


def describe_test(method: str, units: str) -> str:
    """Describe a comparison's test, or the reason why there is none."""
    return _TESTS.get(method, method).format(units)


def format_percent(level: float) -> str:
    """Format a level: "98.33%" for 0.98333."""
    return f"{100 * level:.4g}%"


def describe_selection(ranking: Ranking) -> str:
    """Describe the choice of the best configuration, and its effect on the scores of the same split."""
    return (
        f"chosen from {len(ranking.configurations)} configurations on the {ranking.split} split; its scores on this split "
        "are therefore likely to be optimistic, and their intervals, and those of configurations that cannot be "
        f"distinguished from it, are wider ({format_percent(ranking.level)} instead of 95%, Bonferroni)"
    )


def describe_detectable_differences(runs: Runs) -> list[str]:
    """Describe, in a sentence for each task, the smallest difference that can be detected with 80% power."""
    units = name_units(r for c in runs.analysis.configurations for r in c.runs)
    return [_describe_detectable(task, d, units) for task, d in runs.analysis.detectable.items()]


def _describe_detectable(task: str, d: DetectableDifference, units: str) -> str:
    sample = f"{d.items:,} {SAMPLES}"
    if d.design_effect > 1:
        sample += f", equivalent to {d.items / d.design_effect:.0f} from as many {units},"
    sample = f"{sample} and {d.seeds} seeds of each configuration" if d.seeds > 1 else sample.removesuffix(",")
    if d.difference is None:
        difference = "no difference in accuracy, however large,"
    elif d.accuracy is None:
        unit = d.unit.replace("as scored", "").replace("an item's", "a sample's")
        difference = f"a difference in the mean error of {f'{d.difference:.3g} {unit}'.strip()}"
    else:
        difference = f"a difference in accuracy of {100 * d.difference:.1f} percentage points"
    correction = f", with p corrected for {d.configurations} configurations" if d.configurations > 2 else ""
    accuracy = "" if d.accuracy is None else f"an accuracy of {d.accuracy:.2f} and "
    origin = "as observed here" if d.observed else "assumed, since these runs do not show it"
    required = "more than a million" if d.items_for_5_points is None else f"{d.items_for_5_points:,}"
    return (
        f"On {task}, with {sample}, {difference} would be detected with a probability of 80%{correction} (for {accuracy}a "
        f"correlation of {d.correlation:.2f} between the answers of two configurations, {origin})"
        + ("." if d.accuracy is None else f"; a difference of 5 percentage points would need {required} {SAMPLES}.")
    )
