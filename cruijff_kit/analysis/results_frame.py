"""Results of finished runs as data: read from result.json, as a data frame, as JSON."""

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.comparisons import BASE_MODEL, make_csv_columns
from cruijff_kit.analysis.sweep import Analysis, analyse
from cruijff_kit.records.result import Evaluation, RunResult, read_result
from cruijff_kit.records.run_folder import find_folders
from cruijff_kit.records.sweep_manifest import RunEntry, find_sweep_manifests, read_sweep_manifest, resolve_folder
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import require_folder, write_text

if TYPE_CHECKING:
    import pandas


def read_results(folder: str | Path) -> list[RunResult]:
    """Read the results of every run in or below a folder, in order of start.

    Raises:
        UserError: there is no such folder, it has no results, or one cannot be read.
    """
    folder = Path(folder)
    require_folder(folder)
    paths = find_results(folder)
    if not paths:
        raise UserError(
            f"{folder} holds no results (no result.json below it); cruijff-kit status {folder} shows active runs"
        )
    return sorted(map(read_result, paths), key=lambda r: (r.started, r.name))


def find_results(folder: Path) -> list[Path]:
    """Return every result.json below a folder, and those of the runs that a sweep there reused from an earlier one."""
    reused = (resolve_folder(d, e) for d, e in _list_entries(folder) if e.reused)
    runs = dict.fromkeys([*find_folders(folder, "result.json"), *reused])
    return [run / "result.json" for run in runs if (run / "result.json").exists()]


def list_unfinished_runs(folder: Path) -> list[str]:
    """List the names of the runs of a sweep that have no result yet."""
    return [e.name for d, e in _list_entries(folder) if not (resolve_folder(d, e) / "result.json").exists()]


def _list_entries(folder: Path) -> list[tuple[Path, RunEntry]]:
    """Return the folder and the runs of every sweep manifest below a folder."""
    manifests = ((d, read_sweep_manifest(d)) for d in find_sweep_manifests(folder))
    return [(d, e) for d, manifest in manifests if manifest is not None for e in manifest.runs]


def read_sweep(folder: str | os.PathLike[str]) -> "pandas.DataFrame":
    """Read one row per run: columns of v1's summary, swept settings, losses, and metrics before and after training.

    Metric columns are named TASK/SCORER/METRIC, those of the base model "base model TASK/SCORER/METRIC", the known best
    "bayes_optimum TASK/METRIC", the constant baseline "chance TASK/SCORER/METRIC", comparisons of the run's configuration
    "versus base model TASK/SCORER/METRIC difference" (low, high, p, p_holm, items), "versus chance ..." and "versus best
    ...". "best" is true for the runs of the best configurations.

    Scores are those of the last evaluated epoch; `to_frame(split_by_epoch(read_results(...)))` has all epochs.

    Raises:
        UserError: as for read_results.
    """
    return to_frame(read_results(Path(folder)))


def to_frame(results: list[RunResult]) -> "pandas.DataFrame":
    """Return the rows of `read_sweep` for results."""
    import pandas

    analysis = analyse(results)
    return pandas.DataFrame([_make_row(r, analysis) for r in results])


def split_by_epoch(results: list[RunResult]) -> list[RunResult]:
    """Return a result for each evaluated epoch of each run, with that epoch's scores, and "epoch" as a swept setting."""
    epochs = ((r, dict.fromkeys(e.epoch for e in r.evaluation)) for r in results)
    return [_select_epoch(r, epoch) for r, own in epochs for epoch in own] or results


def _select_epoch(result: RunResult, epoch: int | None) -> RunResult:
    evaluation = [e for e in result.evaluation if e.epoch == epoch]
    if epoch is None or epoch == result.evaluation[-1].epoch:
        training = result.training
    else:  # the loss of the last update is not that of an earlier epoch
        losses = result.training.get("validation_losses") or []
        training = {"validation_loss": losses[epoch] if epoch < len(losses) else None}
    hashes: dict[str, Any] = {"configuration_hash": f"{result.configuration_hash or result.config_hash} {epoch}"}
    swept = result.swept | {"epoch": epoch}
    selection = replace(result, swept=swept, evaluation=evaluation, training=training, **hashes)
    name = selection.objective_name
    selection.objective = None if name is None else selection.metrics().get(name)
    return selection


def _make_row(result: RunResult, analysis: Analysis) -> dict[str, Any]:
    training, settings = result.training, result.settings
    return {
        "Run Name": result.name,
        "Model": result.model,
        "LoRA Rank": settings["lora.rank"],
        "Learning Rate": settings["lr"],
        "Batch Size": settings["batch_size"],
        "Epochs": settings["epochs"],
        "Status": result.status,
        **({"Tier": result.tier} if result.tier != "green" else {}),
        **result.swept,
        "loss": training.get("loss"),
        "validation_loss": training.get("validation_loss"),
        **dict(_list_metrics(result.baseline, f"{BASE_MODEL} ")),
        **dict(_list_metrics(result.evaluation, "")),
        **make_csv_columns(analysis.list_comparisons(result)),
        "samples": result.evaluation[0].samples if result.evaluation else None,
        "seconds": result.seconds.get("total"),
        "best": analysis.is_best(result),
        "error": f"{result.error.type}: {result.error.message}" if result.error else None,
        "config_hash": result.config_hash,
        "configuration_hash": result.configuration_hash,
        "folder": result.paths.get("run"),
    }


def _list_metrics(evaluations: list[Evaluation], prefix: str) -> Iterator[tuple[str, float]]:
    """Yield (column, value) of the metrics; without a prefix also of Bayes optima and chance."""
    for e in evaluations:
        for scorer, values in e.metrics.items():
            for metric, value in values.items():
                yield f"{prefix}{e.task}/{scorer}/{metric}", value
            if scorer in e.coverage:
                yield f"{prefix}{e.task}/{scorer}/coverage", e.coverage[scorer]
        if not prefix:
            yield from ((f"bayes_optimum {e.task}/{metric}", value) for metric, value in e.bayes_optimum.items())
            for scorer, values in e.chance.items():
                yield from ((f"chance {e.task}/{scorer}/{metric}", value) for metric, value in values.items())


def write_csv(sweep_dir: Path, results: list[RunResult]) -> None:
    """Write results.csv: a line for each run, for programs."""
    write_text(sweep_dir / "results.csv", to_frame(results).to_csv(index=False))


def make_empty_dict() -> dict[str, Any]:
    """Return the value of `to_dict` without results."""
    return {"runs": [], "best": None, "configurations": [], "detectable_difference": {}}


def to_dict(results: list[RunResult]) -> dict[str, Any]:
    """Return the JSON output: every result as in its result.json, with the name and the comparisons of its configuration;
    the best; the configurations; and the detectable differences.
    """
    analysis = analyse(results)
    runs = []
    for r in results:
        c = analysis.find_configuration(r)
        comparisons = [comparison.to_dict() for comparison in analysis.list_comparisons(r)]
        runs.append(asdict(r) | {"configuration": c.name if c else None, "comparisons": comparisons})
    return {"runs": runs} | analysis.to_dict()
