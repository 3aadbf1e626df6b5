"""The report's section on samples: some that the best configuration got right and some that it got wrong, in full.

Everything that stands in a sample comes through `samples_of`, which is where the rule for red data holds.
"""

from typing import Any

from cruijff_kit.analysis.report.calibration import best_configurations, instead_of_the_best
from cruijff_kit.analysis.report.document import Sample, Section
from cruijff_kit.analysis.report.load import Run, Runs
from cruijff_kit.records.result import has_red_data

EACH = 3  # right ones, and wrong ones
MOST_LETTERS = 2000
WITHHELD = "the data are red: their samples are withheld from reports"


def samples(runs: Runs) -> Section:
    """Samples of each task of the best configuration; where it has several seeds, of the first one's run."""
    section = Section("samples", "Samples, right and wrong")
    reasons: list[str] = []
    for run, *_ in best_configurations(runs):
        for task in dict.fromkeys(e.task for e in run.result.evaluation):
            found, reason = samples_of(run, task)
            section.samples += found
            reasons += [reason] if reason else []
    section.text = [text for text in [instead_of_the_best(runs)] if text]
    section.text += list(dict.fromkeys(r[0].upper() + r[1:] + "." for r in reasons))
    if not section.samples and WITHHELD not in reasons:
        section.absent = reasons[0] if reasons else "no run has finished that was evaluated"
    return section


def samples_of(run: Run, task: str) -> tuple[list[Sample], str]:
    """Some samples of a run, right ones first, and why there are none; of red data none, whoever asks."""
    if has_red_data(run.result):
        return [], WITHHELD
    from cruijff_kit.evaluation.eval_logs import read_prompts_and_completions  # inspect-ai

    try:
        found: list[dict[str, Any]] = read_prompts_and_completions(run.last(task).log, EACH)
    except Exception as error:  # a log that is gone or broken
        return [], f"the log of {run.label}, task {task}, cannot be read ({type(error).__name__})"
    texts = ("prompt", "target", "answer", "score")
    return [Sample(run.label, task, s["right"], *(_cut(s[k]) for k in texts)) for s in found], ""


def _cut(text: str) -> str:
    return text if len(text) <= MOST_LETTERS else f"{text[:MOST_LETTERS]} … ({len(text) - MOST_LETTERS:,} more letters)"
