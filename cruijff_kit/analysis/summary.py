"""experiment_summary.md: a summary of a sweep for people, from its plan to its findings.

It is rewritten whenever a run ends, and never read. Its content comes from the manifest and the runs' status.json and
result.json.
"""

import contextlib
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from filelock import FileLock

from cruijff_kit.analysis.results_frame import find_results, read_results, write_csv
from cruijff_kit.analysis.sweep import Analysis, analyse, analyse_briefly
from cruijff_kit.analysis.table_cells import (
    SEEDS,
    VERSUS,
    format_cell,
    list_table_notes,
    make_comparison_cells,
    make_result_cells,
    make_seed_cells,
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
from cruijff_kit.slurm.run_states import RunInfo, collect_states, find_runs
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.files import write_text
from cruijff_kit.util.format import format_duration, format_size, now
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
    """Write the summary of a sweep's current state; without the plan for another launcher's sweep, which has no manifest.

    Args:
        sweep_dir: folder of the sweep.
        ask_slurm: whether to query SLURM; False in a job, since the jobs of a sweep would query it too often.
    """
    manifest = read_sweep_manifest(sweep_dir)
    # The lock covers reading: of two runs that end together, the later writer has also read later.
    with FileLock(lock_path(sweep_dir)) if manifest else contextlib.nullcontext():
        write_text(sweep_dir / NAME, _format_summary(sweep_dir, manifest, ask_slurm))


def write_overviews(folder: Path) -> list[RunResult]:
    """Write results.csv and experiment_summary.md into a sweep's folder, or a folder of sweeps, for its current results.

    A run's own folder gets neither, nor does a folder without results.

    Returns:
        The results, in order of start.
    """
    results = read_results(folder) if find_results(folder) else []
    if results and not (folder / "result.json").exists():
        write_csv(folder, results)
        write_summary(folder)
    return results


def _format_summary(sweep_dir: Path, manifest: SweepManifest | None, ask_slurm: bool) -> str:
    runs = find_runs(sweep_dir)
    infos, _ = collect_states(runs, ask_slurm)
    entries = {r.folder: r.entry or RunEntry(r.folder.name, str(r.folder), "", None) for r in runs}
    results = {r.folder: read_result(r.folder / "result.json") for r in runs if (r.folder / "result.json").exists()}
    name = next((r.experiment for r in results.values()), sweep_dir.absolute().parent.name)
    manifest = manifest or SweepManifest(name, [], "")
    is_final = not any(v.state in ACTIVE for v in infos)
    analysis = (analyse if is_final else analyse_briefly)([*results.values()])
    parts = [
        _format_head(manifest, infos, [*results.values()]),
        _format_runs(entries, infos, results, analysis),
        _format_findings([*results.values()], analysis, is_final),
        _format_failures(infos),
        _format_resources(entries, results),
        _format_commands(manifest, sweep_dir, infos),
    ]
    return "\n".join(filter(None, parts))


def refresh_sweep_summary(run: Path) -> None:
    """Rewrite the summary of a run's sweep; a failure is printed and otherwise ignored."""
    sweep_dir = find_sweep_above(run)
    try:
        if sweep_dir is not None:
            write_summary(sweep_dir, ask_slurm=False)
    except (OSError, UserError) as error:
        say(f"{NAME} could not be written: {one_line(error)}")


def _format_head(manifest: SweepManifest, infos: list[RunInfo], results: list[RunResult]) -> str:
    plan = {"Question": manifest.question, "Hypothesis": manifest.hypothesis, "Evaluation plan": manifest.evaluation}
    text = "".join(f"**{title}.** {' '.join(words.split())}\n\n" for title, words in plan.items() if words)
    counts = ", ".join(f"{n} {state}" for state, n in Counter(v.state for v in infos).items())
    notice = red_data_notice(results)
    notice = f"\n{notice[0].upper()}{notice[1:]}.\n" if notice else ""
    return f"# {manifest.experiment}\n\n{text}{len(infos)} run{'s' * (len(infos) != 1)}: {counts} ({now()}).\n{notice}"


def _format_runs(
    entries: dict[Path, RunEntry], infos: list[RunInfo], results: dict[Path, RunResult], analysis: Analysis
) -> str:
    """Return the table of runs: settings and status, and scores where a run has a result."""
    header, rows = make_result_cells([*results.values()], analysis) if results else ([], [])
    base_columns = {"run", "status", *_SETTINGS.values()}
    extra = [i for i, name in enumerate(header) if name not in base_columns]
    result_cells = dict(zip(results, rows, strict=True))
    keys = dict.fromkeys(k for e in entries.values() for k in e.swept)
    swept = [] if results else [k for k in keys if k not in base_columns]
    body = []
    for (folder, entry), info in zip(entries.items(), infos, strict=True):
        result, cells = results.get(folder), result_cells.get(folder)
        settings = result.settings if result else entry.settings
        name = f"**{info.name}**" if result is not None and analysis.is_best(result) else info.name
        row = [name, *(format_cell(settings.get(key)) for key in _SETTINGS.values()), _format_state(info)]
        row += [format_cell(entry.swept.get(k)) for k in swept]
        body.append([*row, *(cells[i] if cells else "" for i in extra)])
    columns = ["Run Name", *_SETTINGS, "Status", *swept, *(header[i] for i in extra)]
    return f"## Runs\n\n{format_markdown(columns, body)}"


def _format_state(info: RunInfo) -> str:
    has_step = info.state in ACTIVE and info.step and info.total_steps
    return info.state + (f" (step {info.step} of {info.total_steps})" if has_step else "")


def _format_findings(results: list[RunResult], analysis: Analysis, is_final: bool) -> str:
    """Return the notes on the runs that are done, and the comparisons when all runs have ended."""
    if not any(r.status == RunState.DONE for r in results):
        return ""
    lines = [line.removeprefix("* ") for line in list_table_notes(results, analysis)]
    text = "\n\n".join(f"{line[0].upper()}{line[1:].removesuffix('.')}." for line in lines) + "\n" * bool(lines)
    if not is_final:
        return text + "\nComparisons follow when all runs have ended.\n"
    if comparisons := make_comparison_cells(analysis):
        text += f"\n{VERSUS}\n\n{format_markdown(*comparisons)}"
    if seeds := make_seed_cells(analysis):
        text += f"\n{SEEDS}\n\n{format_markdown(*seeds)}"
    return text


def _format_failures(infos: list[RunInfo]) -> str:
    lines = [
        f"- {v.name}: {v.state}{f', {v.reason}' if v.reason else ''}"
        for v in infos
        if v.reason and v.state != RunState.DONE
    ]
    return "\n".join(["## What did not go as planned", "", *lines, ""]) if lines else ""


def _format_resources(entries: dict[Path, RunEntry], results: dict[Path, RunResult]) -> str:
    """Return the table of estimated and used resources, for each run and in all."""
    rows: list[list[str]] = []
    sums: Counter[str] = Counter()
    for folder, entry in entries.items():
        rows.append([entry.name, *_add_resources(entry, results.get(folder), sums)])
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
    bases = dict.fromkeys(e.estimate["basis"] for e in entries.values() if e.estimate)
    basis = f"Estimated {'; '.join(bases)}.\n\n" if bases else ""
    return f"## Resources\n\n{basis}{format_markdown(header, rows)}"


def _add_resources(entry: RunEntry, result: RunResult | None, sums: Any) -> list[str]:
    """Return the cells of a run, and add its resources to the sums."""
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
        format_size(estimate["memory_bytes"]) if estimate.get("memory_bytes") else "",
        format_size(peak) if peak else "",
        f"{estimate['gpu_hours']:.3g}" if estimate else "",
        "" if hours is None else f"{hours:.3g}",
    ]


def _format_commands(manifest: SweepManifest, sweep_dir: Path, infos: list[RunInfo]) -> str:
    """Return the commands that repeat the sweep; empty without a manifest."""
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


def format_markdown(header: list[str], rows: list[list[str]]) -> str:
    """Return a table in Markdown; bars in cells are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(
        f"| {' | '.join(c.replace('|', chr(92) + '|').replace(chr(10), ' ') for c in row)} |\n" for row in lines
    )
