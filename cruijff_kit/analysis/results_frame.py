"""Results of finished runs as data: read from result.json, as a data frame, as JSON."""

import os
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cruijff_kit.analysis.comparisons import make_csv_columns
from cruijff_kit.analysis.sweep import Analysis, analyse
from cruijff_kit.records.result import Evaluation, RunResult, read_result
from cruijff_kit.records.run_folder import find_folders
from cruijff_kit.records.sweep_manifest import find_sweep_manifests, read_sweep_manifest, resolve_folder
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import require_folder, write_text

if TYPE_CHECKING:
    import pandas


def read_results(folder: str | Path) -> list[RunResult]:
    """Every run below a folder (or the run that the folder is), in order of start.

    Raises:
        UserError: no such folder, no results in it, or one that cannot be read.
    """
    folder = Path(folder)
    require_folder(folder)
    paths = find_results(folder)
    if not paths:
        raise UserError(
            f"{folder} holds no results (no result.json below it); cruijff-kit status {folder} shows what is "
            "under way there"
        )
    return sorted(map(read_result, paths), key=lambda r: (r.started, r.name))


def find_results(folder: Path) -> list[Path]:
    """Every result.json below a folder, and of the runs that a sweep there took over from an earlier one."""
    reused = (
        resolve_folder(d, e) for d in find_sweep_manifests(folder) for e in read_sweep_manifest(d).runs if e.reused
    )
    runs = dict.fromkeys([*find_folders(folder, "result.json"), *reused])
    return [run / "result.json" for run in runs if (run / "result.json").exists()]


def list_unfinished_runs(folder: Path) -> list[str]:
    """Names of the runs of a sweep that have no result yet."""
    entries = ((d, e) for d in find_sweep_manifests(folder) for e in read_sweep_manifest(d).runs)
    return [e.name for d, e in entries if not (resolve_folder(d, e) / "result.json").exists()]


def read_sweep(folder: str | os.PathLike[str]) -> "pandas.DataFrame":
    """One row per run: columns of v1's summary, what varies, losses, and each task's metrics before and after.

    Metric columns are named TASK/SCORER/METRIC, those of the base model "base model TASK/SCORER/METRIC", the known best
    "bayes_optimum TASK/METRIC", the constant baseline "chance TASK/SCORER/METRIC", comparisons of the run's configuration
    "versus base model TASK/SCORER/METRIC difference" (low, high, p, p_holm, items), "versus chance ..." and "versus best
    ...". "best" says whether the configuration is among the best.

    Of several evaluated epochs the last one; `to_frame(split_by_epoch(read_results(...)))` has all.

    Raises:
        UserError: as read_results.
    """
    return to_frame(read_results(Path(folder)))


def to_frame(results: list[RunResult]) -> "pandas.DataFrame":
    """The rows of `read_sweep` for results that are read already."""
    import pandas

    analysis = analyse(results)
    return pandas.DataFrame([_row(r, analysis) for r in results])


def split_by_epoch(results: list[RunResult]) -> list[RunResult]:
    """Each result once for each epoch that was evaluated, with what is known of that epoch, and "epoch" as what varies."""
    return [_at(r, epoch) for r in results for epoch in dict.fromkeys(e.epoch for e in r.evaluation)] or results


def _at(result: RunResult, epoch: int) -> RunResult:
    own = [e for e in result.evaluation if e.epoch == epoch]
    if epoch == result.evaluation[-1].epoch:
        training = result.training
    else:  # a loss of the last update says nothing of an earlier epoch
        losses = result.training.get("validation_losses") or []
        training = {"validation_loss": losses[epoch] if epoch < len(losses) else None}
    hashes: dict[str, Any] = {"configuration_hash": f"{result.configuration_hash or result.config_hash} {epoch}"}
    at = replace(result, swept=result.swept | {"epoch": epoch}, evaluation=own, training=training, **hashes)
    at.objective = at.metrics().get(at.objective_name)
    return at


def _row(result: RunResult, analysis: Analysis) -> dict[str, Any]:
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
        **dict(_metrics(result.baseline, "base model ")),
        **dict(_metrics(result.evaluation, "")),
        **make_csv_columns(analysis.list_comparisons(result)),
        "samples": result.evaluation[0].samples if result.evaluation else None,
        "seconds": result.seconds.get("total"),
        "best": analysis.is_best(result),
        "error": f"{result.error.type}: {result.error.message}" if result.error else None,
        "config_hash": result.config_hash,
        "configuration_hash": result.configuration_hash,
        "folder": result.paths.get("run"),
    }


def _metrics(evaluations: list[Evaluation], prefix: str) -> Iterator[tuple[str, float]]:
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
    """results.csv: a line a run, for programs."""
    write_text(sweep_dir / "results.csv", to_frame(results).to_csv(index=False))


def make_empty_dict() -> dict[str, Any]:
    """As `to_dict`, while there are no results."""
    return {"runs": [], "best": None, "configurations": [], "detectable_difference": {}}


def to_dict(results: list[RunResult]) -> dict[str, Any]:
    """What --json prints: every result as its result.json has it, with the comparisons of its configuration; the best; the
    configurations; and what could be found.
    """
    analysis = analyse(results)
    runs = []
    for r in results:
        c = analysis.find_configuration(r)
        more = {
            "configuration": c.name if c else None,
            "comparisons": [x.to_dict() for x in analysis.list_comparisons(r)],
        }
        runs.append(asdict(r) | more)
    return {"runs": runs} | analysis.to_dict()
