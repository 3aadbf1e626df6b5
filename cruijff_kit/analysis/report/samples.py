"""The report's section on samples: some correct and some incorrect answers of the best configuration, in full.

All contents of samples come through `read_samples`, which withholds those of red data.
"""

from typing import Any

from cruijff_kit.analysis.report.calibration import best_configuration_runs, describe_choice
from cruijff_kit.analysis.report.document import Sample, Section
from cruijff_kit.analysis.report.load import Runs, RunWithResult
from cruijff_kit.records.result import has_red_data

SAMPLES_PER_OUTCOME = 3  # of correct answers, and of incorrect ones
MAX_CHARACTERS = 2000
WITHHELD = "the data are red: their samples are withheld from reports"


def build_samples(runs: Runs) -> Section:
    """Build the section: samples of each task of the best configuration, from the run of its first seed."""
    section = Section("samples", "Samples with correct and incorrect answers")
    reasons: list[str] = []
    for run, *_ in best_configuration_runs(runs):
        for task in dict.fromkeys(e.task for e in run.result.evaluation):
            task_samples, reason = read_samples(run, task)
            section.samples += task_samples
            reasons += [reason] if reason else []
    section.text = [text for text in [describe_choice(runs)] if text]
    section.text += list(dict.fromkeys(r[0].upper() + r[1:] + "." for r in reasons))
    if not section.samples and WITHHELD not in reasons:
        section.absent = reasons[0] if reasons else "no evaluated run has finished"
    return section


def read_samples(run: RunWithResult, task: str) -> tuple[list[Sample], str]:
    """Return some samples of a run, correct ones first, or the reason why there are none; never any of red data."""
    if has_red_data(run.result):
        return [], WITHHELD
    from cruijff_kit.evaluation.eval_logs import read_prompts_and_completions  # inspect-ai

    evaluation = run.last_evaluation(task)
    assert evaluation is not None, "the task is one of the run's"
    try:
        answers: list[dict[str, Any]] = read_prompts_and_completions(evaluation.log, SAMPLES_PER_OUTCOME)
    except Exception as error:  # the log is missing or broken
        return [], f"the log of {run.label}, task {task}, cannot be read ({type(error).__name__})"
    texts = ("prompt", "target", "answer", "score")
    return [Sample(run.label, task, s["right"], *(_truncate(s[k]) for k in texts)) for s in answers], ""


def _truncate(text: str) -> str:
    rest = len(text) - MAX_CHARACTERS
    return f"{text[:MAX_CHARACTERS]} … ({rest:,} more characters)" if rest > 0 else text
