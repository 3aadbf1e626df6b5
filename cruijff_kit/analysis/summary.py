"""experiment_summary.md: a sweep for people, from its plan to its findings.

Written again whenever a run ends, never read back. Everything comes from the manifest and the runs' status.json and
result.json.
"""

import contextlib
import shlex
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from filelock import FileLock

from cruijff_kit.analysis.results_frame import find_results, read_results, write_csv
from cruijff_kit.analysis.sweep import Analysis, analyse, analyse_briefly
from cruijff_kit.analysis.table_cells import (
    SEEDS,
    VERSUS,
    cell,
    lines_below,
    seed_cells,
    table_cells,
    versus_cells,
)
from cruijff_kit.records.result import RunResult, read_result, red_data_notice
from cruijff_kit.records.run_status import ACTIVE, RunState
from cruijff_kit.records.sweep_manifest import (
    RunEntry,
    SweepManifest,
    find_sweep_above,
    format_command,
    lock_path,
    read_sweep_manifest,
)
from cruijff_kit.slurm.run_states import RunInfo, RunRef, collect_states, find_runs
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.files import write_text
from cruijff_kit.util.format import format_duration, now
from cruijff_kit.util.progress import say

NAME = "experiment_summary.md"
_SETTINGS = {
    "Model": "model",
    "LoRA Rank": "lora.rank",
    "Learning Rate": "lr",
    "Batch Size": "batch_size",
    "Epochs": "epochs",
}


def write_summary(sweep_dir: Path, ask_slurm: bool = True) -> None:
    """Write a sweep's summary as things stand now; under a launcher that is not ours it has no manifest, and no plan.

    Args:
        ask_slurm: False where a job writes it, which would trouble the cluster each time.
    """
    manifest = read_sweep_manifest(sweep_dir)
    # Who writes last has read last: two runs that end together would else leave the older view.
    with FileLock(lock_path(sweep_dir)) if manifest else contextlib.nullcontext():
        write_text(sweep_dir / NAME, _summary(sweep_dir, manifest, ask_slurm))


def write_overviews(folder: Path) -> list[RunResult]:
    """Write results.csv and experiment_summary.md of a sweep's folder, or of one above, as its runs stand now.

    A run's own folder has neither, nor has one without results.

    Returns:
        The results, in order of start.
    """
    results = read_results(folder) if find_results(folder) else []
    if results and not (folder / "result.json").exists():
        write_csv(folder, results)
        write_summary(folder)
    return results


def _summary(sweep_dir: Path, manifest: SweepManifest | None, ask_slurm: bool) -> str:
    runs = find_runs(sweep_dir)
    infos, _ = collect_states(runs, ask_slurm)
    runs = [k if k.entry else replace(k, entry=RunEntry(k.folder.name, str(k.folder), "", None)) for k in runs]
    results = {k.folder: read_result(k.folder / "result.json") for k in runs if (k.folder / "result.json").exists()}
    name = next((r.experiment for r in results.values()), sweep_dir.absolute().parent.name)
    manifest = manifest or SweepManifest(name, [], "")
    made = [*results.values()]
    is_final = not any(v.state in ACTIVE for v in infos)
    analysis = (analyse if is_final else analyse_briefly)(made)
    parts = [_head(manifest, infos, made), _runs(runs, infos, results, analysis), _findings(made, analysis, is_final)]
    parts.append(_failures(infos))
    return "\n".join(filter(None, [*parts, _resources(runs, results), _again(manifest, sweep_dir, infos)]))


def refresh_sweep_summary(run: Path) -> None:
    """Bring the summary of the sweep that a run belongs to up to date; what goes wrong is said, and changes nothing."""
    above = find_sweep_above(run)
    try:
        if above is not None:
            write_summary(above, ask_slurm=False)
    except (OSError, UserError) as error:
        say(f"{NAME} could not be written: {one_line(error)}")


def _head(manifest: SweepManifest, infos: list[RunInfo], results: list[RunResult]) -> str:
    told = {"Question": manifest.question, "Hypothesis": manifest.hypothesis, "Evaluation plan": manifest.evaluation}
    about = "".join(f"**{title}.** {' '.join(text.split())}\n\n" for title, text in told.items() if text)
    counts = ", ".join(f"{n} {state}" for state, n in Counter(v.state for v in infos).items())
    line = red_data_notice(results)
    said = f"\n{line[0].upper()}{line[1:]}.\n" if line else ""
    return f"# {manifest.experiment}\n\n{about}{len(infos)} run{'s' * (len(infos) != 1)}: {counts} ({now()}).\n{said}"


def _runs(runs: list[RunRef], infos: list[RunInfo], results: dict[Path, RunResult], analysis: Analysis) -> str:
    """Every run with its settings and status, and of those that have ended what they came to."""
    made = list(results.values())
    header, rows = table_cells(made, analysis) if made else ([], [])
    told = {"run", "status", *_SETTINGS.values()}
    extra = [i for i, name in enumerate(header) if name not in told]
    ended = dict(zip(results, rows, strict=True))
    swept = [] if made else [k for k in dict.fromkeys(k for r in runs for k in r.entry.swept) if k not in told]
    body = []
    for known, info in zip(runs, infos, strict=True):
        result, cells = results.get(known.folder), ended.get(known.folder)
        settings = result.settings if result else known.entry.settings
        name = f"**{info.name}**" if result is not None and analysis.is_best(result) else info.name
        shown = [name, *(cell(settings.get(key)) for key in _SETTINGS.values()), _state(info)]
        shown += [cell(known.entry.swept.get(k)) for k in swept]
        body.append([*shown, *(cells[i] if cells else "" for i in extra)])
    head = ["Run Name", *_SETTINGS, "Status", *swept, *(header[i] for i in extra)]
    return f"## Runs\n\n{markdown(head, body)}"


def _state(info: RunInfo) -> str:
    at = f" (step {info.step} of {info.total_steps})" if info.state in ACTIVE and info.step and info.total_steps else ""
    return info.state + at


def _findings(results: list[RunResult], analysis: Analysis, is_final: bool) -> str:
    """What the runs that are done come to; comparisons when all have ended."""
    if not any(r.status == RunState.DONE for r in results):
        return ""
    lines = [line.removeprefix("* ") for line in lines_below(results, analysis)]
    text = "\n\n".join(f"{line[0].upper()}{line[1:].removesuffix('.')}." for line in lines) + "\n" * bool(lines)
    if not is_final:
        return text + "\nComparisons follow when all runs have ended.\n"
    if versus := versus_cells(analysis):
        text += f"\n{VERSUS}\n\n{markdown(*versus)}"
    if seeds := seed_cells(analysis):
        text += f"\n{SEEDS}\n\n{markdown(*seeds)}"
    return text


def _failures(infos: list[RunInfo]) -> str:
    lines = [
        f"- {v.name}: {v.state}{f', {v.reason}' if v.reason else ''}"
        for v in infos
        if v.reason and v.state != RunState.DONE
    ]
    return "\n".join(["## What did not go as planned", "", *lines, ""]) if lines else ""


def _resources(runs: list[RunRef], results: dict[Path, RunResult]) -> str:
    """Estimate and fact side by side, for each run and in all."""
    rows: list[list[str]] = []
    sums: Counter[str] = Counter()
    for known in runs:
        row = _spent(known.entry, results.get(known.folder), sums)
        rows.append([known.entry.name, *row])
    header = [
        "Run Name",
        "Estimated time",
        "Time",
        "Estimated memory",
        "Peak memory",
        "Estimated GPU-hours",
        "GPU-hours",
    ]
    sums_row = [format_duration(sums[n]) if sums[n] else "" for n in ("estimated", "took")]
    hours_row = [f"{sums[n]:.3g}" for n in ("estimated_hours", "hours")]
    rows.append(["in all", *sums_row, "", "", *hours_row])
    bases = dict.fromkeys(k.entry.estimate["basis"] for k in runs if k.entry.estimate)
    basis = f"Estimated {'; '.join(bases)}.\n\n" if bases else ""
    return f"## Resources\n\n{basis}{markdown(header, rows)}"


def _spent(entry: RunEntry, result: RunResult | None, sums: Any) -> list[str]:
    """The cells of a run; adds to the sums."""
    estimate, took = entry.estimate, result.seconds.get("total") if result else None
    hours = result.gpu_hours() if result else None
    sums["estimated"] += estimate.get("seconds", 0)
    sums["took"] += took or 0
    sums["estimated_hours"] += estimate.get("gpu_hours", 0)
    sums["hours"] += hours or 0
    peak = result.training.get("peak_memory_bytes") if result else None
    return [
        format_duration(estimate["seconds"]) if estimate else "",
        "" if took is None else format_duration(took),
        _gigabytes(estimate.get("memory_bytes")),
        _gigabytes(peak),
        f"{estimate['gpu_hours']:.3g}" if estimate else "",
        "" if hours is None else f"{hours:.3g}",
    ]


def _gigabytes(size: float | None) -> str:
    return f"{size / 1e9:.2f} GB" if size else ""


def _again(manifest: SweepManifest, sweep_dir: Path, infos: list[RunInfo]) -> str:
    if not manifest.cwd:
        return ""
    folder = shlex.quote(str(sweep_dir.absolute()))
    lines = [f"cd {shlex.quote(manifest.cwd)}", format_command(manifest)]
    if any(v.state == RunState.PLANNED for v in infos):
        lines.append(f"cruijff-kit resume {folder}               # starts the planned runs")
    lines.append(f"cruijff-kit reproduce {folder}/RUN               # repeats a run and compares the two")
    code = f"Code: commit {manifest.git_commit}." if manifest.git_commit else f"Code: {manifest.code}."
    return (
        "## How to repeat it\n\n" + "".join(f"    {line}\n" for line in lines) + f"\n{code} Made {manifest.created}.\n"
    )


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown; a bar inside a cell stays inside it."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        f"| {' | '.join(c.replace('|', chr(92) + '|').replace(chr(10), ' ') for c in row)} |\n" for row in lines
    )
