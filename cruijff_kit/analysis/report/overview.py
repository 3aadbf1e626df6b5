"""The report's first section: what was asked, which runs there are, and the command that repeats them."""

import shlex
from typing import Any

import yaml

from cruijff_kit.analysis.configurations import Configuration, last_evaluation
from cruijff_kit.analysis.estimates import estimate_evaluation, estimate_loss
from cruijff_kit.analysis.rankings import find_source
from cruijff_kit.analysis.report.document import Section, Table, listed, plain, several
from cruijff_kit.analysis.report.load import Run, Runs
from cruijff_kit.analysis.report.wording import percent, range_in_words
from cruijff_kit.config.overrides import typed_arguments
from cruijff_kit.records.sweep_manifest import format_command

_ORDER = ("done", "running", "evaluating", "queued", "interrupted", "cancelled", "failed")


def overview(runs: Runs) -> Section:
    """Question, hypothesis and plan of each sweep where they were written down; the runs by state."""
    section = Section("overview", "What was run")
    asked = [(manifest, name) for manifest in runs.manifests for name in ("question", "hypothesis", "evaluation")]
    words = {"question": "Question", "hypothesis": "Hypothesis", "evaluation": "Evaluation plan"}
    section.text = list(dict.fromkeys(f"{words[n]}: {getattr(led, n)}" for led, n in asked if getattr(led, n)))
    if runs.trouble:
        section.text.append(f"SLURM does not answer; the runs last reported: {runs.trouble}")
    keys = varied(runs.all)
    rows = [[r.label, r.info.state, *(plain(r.value(k)) for k in keys), *_outcome(runs, r)] for r in runs.all]
    header = ["run", "state", *keys, "objective", "value", "value: 95%", "loss", "validation loss",
              "validation loss: 95%", "started (UTC)", "folder"]  # fmt: skip
    optional = ("objective", "value", "value: 95%", "validation loss", "validation loss: 95%")
    kept = [i for i, name in enumerate(header) if name not in optional or any(row[i] is not None for row in rows)]
    best = {i for i, r in enumerate(runs.all) if r in runs.best}
    levels = [percent(f.ranking.level) for f in runs.families if f.ranking.is_optimistic]
    caption = "Every run" + (
        f" (95%: {listed(levels, 'or')} for the best on the split that chose it)" if levels else ""
    )
    table = [[row[i] for i in kept] for row in rows]
    section.blocks.append(Table("runs", caption, [header[i] for i in kept], table, best))
    return section


def states_in_words(runs: Runs) -> str:
    """ "8 runs: 6 done, 2 failed"."""
    counts = runs.states()
    states = sorted(counts, key=lambda s: _ORDER.index(s) if s in _ORDER else len(_ORDER))
    return f"{several(len(runs.all), 'run')}: {', '.join(f'{counts[s]} {s}' for s in states)}"


def commands(runs: Runs) -> list[str]:
    """The command lines that made the runs; a single run that left no manifest is repeated from its config."""
    lines = [format_command(manifest) for manifest in runs.manifests]
    if not lines and len(runs.all) == 1:
        lines = [line for line in [_typed(runs.all[0])] if line]
    return list(dict.fromkeys(lines))


def _typed(run: Run) -> str | None:
    """What Hydra keeps of the command of a single run."""
    try:
        hydra = yaml.safe_load((run.folder / ".hydra" / "hydra.yaml").read_text(encoding="utf-8"))["hydra"]
        typed = typed_arguments(hydra)
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    return f"python -m cruijff_kit.train {shlex.join(typed)}".rstrip()


def title(runs: Runs) -> str:
    """The experiments' names."""
    names = dict.fromkeys(r.result.experiment for r in runs.with_result)
    names |= dict.fromkeys(manifest.experiment for manifest in runs.manifests)
    return listed([*names][:3]) + (" and others" if len(names) > 3 else "") if names else runs.folder.absolute().name


def varied(runs: list[Run]) -> list[str]:
    """Keys that are swept over in any of the runs, in their order."""
    return list(dict.fromkeys(k for r in runs for k in r.swept))


def _outcome(runs: Runs, run: Run) -> list[Any]:
    """Objective, losses, start and folder; with intervals over other rows, of those of the test split as everywhere."""
    r = run.result
    if r is None:
        return [None, None, None, run.info.loss, None, None, None, str(run.folder)]
    of_rows = estimate_loss(Configuration(r.name, {}, [r]), "validation_loss")
    source, over = find_source(r), None
    if source is not None:
        over = estimate_evaluation(
            last_evaluation(r, source[0]), *source[1:], runs.level_of(run, last_evaluation(r, source[0]), source)
        )
    elif r.objective_name == "validation_loss":
        over = of_rows
    losses = [r.training.get("loss"), r.training.get("validation_loss")]
    started = r.started[:19].replace("T", " ")
    ends = range_in_words(over)
    return [r.objective_name, r.objective, ends, *losses, range_in_words(of_rows), started, str(run.folder)]
