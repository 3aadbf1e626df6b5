"""Evaluate what is trained already: `cruijff-kit evaluate [DIR] [KEY=VALUE ...]`.

cruijff-kit evaluate multirun/capitalization eval=match                            a sweep's adapters: what is missing
cruijff-kit evaluate RUN_DIR 'eval.tasks=[my_tasks.py@sums]' eval.epochs=all
cruijff-kit evaluate ADAPTER_DIR dataset=files dataset.path=my.csv                 an adapter that PEFT saved
cruijff-kit evaluate model=hf_llama model.path=MODEL_DIR                           a base model alone

What finished runs have already (run x epoch x task) is left as it is. Runs that were submitted to SLURM are evaluated
there, in one job for all runs of one base model; slurm.submit=false evaluates them here.
--json: {"folder", "made": [{"run", "task", "epoch", "log"}], "submitted", "runs": as of `table --json`}; with dry_run=true
{"dry_run", "cells"}.
"""

import argparse
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from cruijff_kit.analysis.results_frame import make_empty_dict
from cruijff_kit.commands.base import Parser, import_from_cwd
from cruijff_kit.config.compose import compose
from cruijff_kit.config.run import RunConfig
from cruijff_kit.evaluation.evaluation_grid import EvaluationGrid
from cruijff_kit.models.adapter_files import is_adapter_folder
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import ACTIVE, RunState, read_status, write_status
from cruijff_kit.records.saved_config import allow_sensitive, load_saved_config
from cruijff_kit.records.sweep_manifest import is_done
from cruijff_kit.runs.evaluation_request import (
    ADAPTER,
    BASE,
    NAME,
    EvaluationRequest,
    check_requested,
    find_requested,
    load_result,
    write_request,
)
from cruijff_kit.runs.model_source import adapter_overrides, has_override, model_overrides, repr_text
from cruijff_kit.slurm.run_states import RunRef, collect_states, find_run, find_runs
from cruijff_kit.sweep.evaluation_overrides import EvaluationOverrides
from cruijff_kit.sweep.start_posthoc import PlannedEvaluation, print_results, start_evaluations
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import ClusterError, UserError
from cruijff_kit.util.files import require_folder
from cruijff_kit.util.progress import progress, say


def evaluate(where: Path | None, overrides: list[str], config_dir: str | None = None) -> Path | None:
    """Evaluate what is missing: each run, epoch and task without a result.

    Args:
        where: folder of a run, a sweep, an adapter or a model, or one above runs; None: the model that `overrides` name.
        overrides: as for cruijff_kit.train; of runs only eval, slurm, device, threads, dry_run and force can differ.
        config_dir: folder with YAML of the user's.
    Returns:
        The folder whose table is shown next; None if there is nothing to show yet.
    Raises:
        UserError: it cannot work; nothing was evaluated.
        ClusterError: SLURM refused or does not answer.
        SystemExit: with code 1 if an item failed.
    """
    if where is not None:
        require_folder(where)
    if where is not None and is_adapter_folder(where):
        return _evaluate_model(where, overrides, config_dir)
    if where is not None and (where / "config.json").is_file() and not (where / "result.json").exists():
        return _evaluate_model(None, [*model_overrides(where, overrides), *overrides], config_dir)
    if where is not None:
        return _evaluate_runs(where, overrides, config_dir)
    return _evaluate_model(None, overrides, config_dir)


def _evaluate_runs(where: Path, overrides: list[str], config_dir: str | None) -> Path | None:
    runs = _find_finished(where)
    changes = EvaluationOverrides(overrides, config_dir)
    plans = _plan(runs, changes)
    if changes.is_dry_run:
        _show_missing([(p.run.folder.name, p.missing) for p in plans])
        return None
    for plan in plans:
        if not plan.missing:
            _withdraw(plan.run.folder)
            continue
        if "dataset.permission" in changes.values:
            allow_sensitive(plan.run.folder, plan.config.dataset.permission)
        write_request(plan.run.folder, plan.request)
    json_output.record(folder=str(where.absolute()), made=[], submitted=[], **make_empty_dict())
    return _start(where, [p for p in plans if p.missing])


def _find_finished(where: Path) -> list[RunRef]:
    """Find the finished runs below a folder, and name the others.

    Raises:
        UserError: there is none, or one is being evaluated.
    """
    refs = find_runs(where)
    infos, _ = collect_states(refs)
    finished = [(ref, info) for ref, info in zip(refs, infos, strict=True) if is_done(ref.folder)]
    folders = {str(ref.folder) for ref, _ in finished}
    others = [info.name for info in infos if info.folder not in folders]
    if not finished:
        raise UserError(f"{where} has no finished run; cruijff-kit status {where}")
    if busy := [info.name for _, info in finished if info.state in ACTIVE]:
        raise UserError(f"{', '.join(busy[:3])}: an evaluation is active; cruijff-kit status {where}")
    if others:
        some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        say(f"left out, because not finished: {some} (cruijff-kit resume {where})")
    return [ref for ref, _ in finished]


def _plan(runs: list[RunRef], changes: EvaluationOverrides) -> list[PlannedEvaluation]:
    """Work out what each run lacks, and check it.

    Raises:
        UserError: it cannot work; nothing was written.
    """
    plans = []
    with progress("checking", len(runs)) as bar:
        for ref in runs:
            plans.append(_plan_run(ref, changes))
            bar.advance()
    return plans


def _plan_run(ref: RunRef, changes: EvaluationOverrides) -> PlannedEvaluation:
    folder, saved = RunFolder(ref.folder), changes.note_caller(load_saved_config(ref.folder))
    result, request = read_result(folder.result), changes.request(saved)
    request.adapter = result.paths.get("adapter")
    if request.adapter:
        request.subject = ADAPTER
    elif result.settings["lora.rank"] is None:
        request.subject = BASE
    config = request.apply(saved)
    _require_tasks(config)
    missing = find_requested(request, config, result, folder)
    if missing:
        check_requested(missing, request, config, result, folder)
    return PlannedEvaluation(ref, request, config, missing)


def _require_tasks(config: RunConfig) -> None:
    if not config.eval.tasks:
        raise UserError("eval.tasks is empty, so there is nothing to evaluate; for example eval=match")


def _start(where: Path, plans: list[PlannedEvaluation]) -> Path | None:
    """Start evaluations; withdraw the requests of those that SLURM did not take."""
    if not plans:
        say("every cell exists already")
    before = [_count_submissions(p.run.folder) for p in plans]
    try:
        return start_evaluations(where, plans)
    except ClusterError:
        for plan, count in zip(plans, before, strict=True):
            if _count_submissions(plan.run.folder) == count:
                _withdraw(plan.run.folder)
        raise


def _count_submissions(run: Path) -> int:
    entry = find_run(run).entry
    return len(entry.submissions) if entry else 0


def _withdraw(run: Path) -> None:
    """Remove a request that was written once: it failed, or SLURM did not take it."""
    if (run / NAME).exists():
        (run / NAME).unlink()
        status = read_status(run)
        status.state, status.reason, status.cause = RunState.DONE, None, None
        write_status(run, status)


def _evaluate_model(adapter: Path | None, overrides: list[str], config_dir: str | None) -> Path | None:
    """Evaluate an adapter from elsewhere, or a base model; its results lie in a new folder below multirun/."""
    of_adapter = adapter_overrides(adapter, overrides) if adapter else []
    is_named = has_override(overrides, "run_name") or has_override(overrides, "output_dir")
    name = repr_text(adapter.absolute().name) if adapter else "${model.name}"
    config = compose([*of_adapter, *([] if is_named else [f"run_name={name}"]), *overrides], config_dir)
    _require_tasks(config)
    request = EvaluationRequest(asdict(config.eval), asdict(config.slurm), config.device, config.threads, BASE)
    if adapter:
        request.subject, request.adapter = ADAPTER, str(adapter.absolute())
    folder = RunFolder(config.output_dir)
    if folder.result.exists():
        raise UserError(f"{folder.path} already holds a run; choose another output_dir")
    result = load_result(folder.path, request, config)
    missing = find_requested(request, config, result, folder)
    if not missing:
        raise UserError("eval.baseline=false skips the base model, which is the only model here; set it to true")
    check_requested(missing, request, config, result, folder)
    if config.dry_run:
        _show_missing([(config.run_name, missing)])
        return None
    folder.freeze(config, {})
    write_request(folder.path, request)
    json_output.record(folder=str(folder.path), made=[], submitted=[], **make_empty_dict())
    try:
        return start_evaluations(folder.path, [PlannedEvaluation(RunRef(folder.path), request, config, missing)])
    except Exception:
        if not folder.result.exists():  # nothing began
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _show_missing(rows: list[tuple[str, EvaluationGrid]]) -> None:
    if json_output.is_enabled():
        json_output.record(dry_run=True, cells=[{"run": name, **cells.to_dict()} for name, cells in rows])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="to evaluate; nothing is started", title_justify="left")
    for column in ("run", "cells", "which"):
        table.add_column(column, overflow="fold")
    for name, cells in rows:
        table.add_row(name, str(len(cells)), cells.summary())
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def _command(options: argparse.Namespace) -> None:
    folders = [i for i in options.items if "=" not in i or Path(i).is_dir()]
    overrides = [i for i in options.items if i not in folders]
    if len(folders) > 1:
        raise UserError(f"{folders[1]}: one folder can be named; settings are written key=value")
    if not options.items:
        raise UserError("name a run's or a sweep's folder, an adapter's, or a model; --help has examples")
    where = evaluate(Path(folders[0]) if folders else None, overrides, options.config_dir)
    if where is not None:
        print_results(where)


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = Parser(
        "evaluate",
        "Evaluate finished runs, a saved adapter, or a base model alone.",
        "the new cells and every result, as one JSON document",
    )
    parser.add_examples(__doc__)
    parser.add_argument(
        "items",
        metavar="DIR | KEY=VALUE",
        nargs="*",
        help="a run, a sweep, a folder above; or an adapter's folder; or a model's. Then settings as for cruijff_kit.train",
    )
    parser.add_argument("--config-dir", metavar="DIR", help="folder with your own YAML")
    import_from_cwd()
    return parser.run(argv, _command)


if __name__ == "__main__":
    raise SystemExit(main())
