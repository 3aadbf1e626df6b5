"""Evaluate what is trained already: `cruijff-kit evaluate [DIR] [KEY=VALUE ...]`.

cruijff-kit evaluate multirun/capitalization eval=match                            a sweep's adapters: what is missing
cruijff-kit evaluate RUN_DIR 'eval.tasks=[my_tasks.py@sums]' eval.epochs=all
cruijff-kit evaluate ADAPTER_DIR dataset=files dataset.path=my.csv                 an adapter that PEFT saved
cruijff-kit evaluate model=hf_llama model.path=MODEL_DIR                           a base model alone

The cells (run x epoch x task) that finished runs have already are left as they are. What was submitted to SLURM is
evaluated there, in one job for all runs of one base model; slurm.submit=false evaluates it here.
--json: {"folder", "made": [{"run", "task", "epoch", "log"}], "submitted", "runs": as of `table --json`}; with dry_run=true
{"dry_run", "cells"}.
"""

import argparse
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from cruijff_kit.analysis.results_frame import no_data
from cruijff_kit.commands.base import Parser
from cruijff_kit.config.compose import compose
from cruijff_kit.config.run import RunConfig
from cruijff_kit.evaluation.cells import EvaluationGrid
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import ACTIVE, DONE, read_status, write_status
from cruijff_kit.records.saved_config import frozen, permit
from cruijff_kit.records.sweep_manifest import is_done
from cruijff_kit.runs import posthoc_evaluation
from cruijff_kit.runs.model_source import model_at, quoted_text, settings_of, typed
from cruijff_kit.runs.posthoc_evaluation import NAME
from cruijff_kit.slurm.run_states import RunRef, collect_states, find_origin, find_runs
from cruijff_kit.sweep.start_posthoc import Changes, show, start
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import ClusterError, UserError
from cruijff_kit.util.files import require_folder
from cruijff_kit.util.progress import progress, say


def evaluate(where: Path | None, overrides: list[str], config_dir: str | None = None) -> Path | None:
    """Make the cells that are missing.

    Args:
        where: a run, a sweep or a folder above; an adapter; a model's folder; None: the model that `overrides` name.
        overrides: as for cruijff_kit.train; of runs only eval, slurm, device, threads, dry_run and force can differ.
        config_dir: folder with YAML of the user's.
    Returns:
        The folder whose table to show; None where nothing is there to show yet.
    Raises:
        UserError: it cannot work; nothing was evaluated.
        ClusterError: SLURM refused or does not answer.
        SystemExit: with code 1 if a cell failed.
    """
    if where is not None:
        require_folder(where)
    if where is not None and (where / "adapter_config.json").is_file():
        return _alone(where, overrides, config_dir)
    if where is not None and (where / "config.json").is_file() and not (where / "result.json").exists():
        return _alone(None, [*model_at(where, overrides), *overrides], config_dir)
    return _runs(where, overrides, config_dir) if where is not None else _alone(None, overrides, config_dir)


def _runs(where: Path, overrides: list[str], config_dir: str | None) -> Path | None:
    known = find_runs(where)
    infos, _ = collect_states(known)
    finished = [(k, v) for k, v in zip(known, infos, strict=True) if is_done(k.folder)]
    others = [v.name for v in infos if v.folder not in {str(k.folder) for k, _ in finished}]
    if not finished:
        raise UserError(f"{where} has no finished run; cruijff-kit status {where}")
    if busy := [v.name for _, v in finished if v.state in ACTIVE]:
        raise UserError(f"{', '.join(busy[:3])}: an evaluation is on its way; cruijff-kit status {where}")
    if others:
        some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        say(f"left out, because not finished: {some} (cruijff-kit resume {where})")
    changes, waiting = Changes(overrides, config_dir), []
    with progress("checking", len(finished)) as bar:
        for run, _ in finished:
            folder, was = RunFolder(run.folder), changes.said(frozen(run.folder))
            result, request = read_result(folder.result), changes.request(was)
            # An adapter from elsewhere, or a base model, is what it was.
            request.adapter = result.paths.get("adapter")
            is_base = result.settings["lora.rank"] is None
            request.of = (
                posthoc_evaluation.ADAPTER
                if request.adapter
                else posthoc_evaluation.BASE
                if is_base
                else posthoc_evaluation.RUN
            )
            config = posthoc_evaluation.with_request(was, request)
            _require_tasks(config)
            cells = posthoc_evaluation.cells_of(request, config, result, folder)
            if cells:
                posthoc_evaluation.check_cells(cells, request, config, result, folder)
            waiting.append((run, request, config, cells))
            bar.advance()
    if changes.dry_run:
        _show_missing([(k.folder.name, cells) for k, _, _, cells in waiting])
        return None
    for run, request, config, cells in waiting:
        if cells and "dataset.permission" in changes.values:
            permit(run.folder, config.dataset.permission)
        if cells:
            posthoc_evaluation.write_request(run.folder, request)
        else:
            _nothing_waits(run.folder)
    left = [(run, config) for run, _, config, cells in waiting if cells]
    json_output.record(folder=str(where.absolute()), made=[], submitted=[], **no_data())
    if not left:
        say("every cell is there already")
    before = {run.folder: _submissions(run) for run, _ in left}
    try:
        return start(where, left)
    except ClusterError:
        for run, _ in left:
            if _submissions(run) == before[run.folder]:  # SLURM did not take it
                _nothing_waits(run.folder)
        raise


def _submissions(run: RunRef) -> int:
    known = find_origin(next(k for k in find_runs(run.folder) if k.folder == run.folder))
    return len(known.entry.submissions) if known.entry else 0


def _require_tasks(config: RunConfig) -> None:
    if not config.eval.tasks:
        raise UserError("eval.tasks is empty, so there is nothing to evaluate; for example eval=match")


def _nothing_waits(run: Path) -> None:
    """An evaluation that was asked for once, and failed, is no longer wanted."""
    if (run / NAME).exists():
        (run / NAME).unlink()
        status = read_status(run)
        status.state, status.reason, status.cause = DONE, None, None
        write_status(run, status)


def _alone(adapter: Path | None, overrides: list[str], config_dir: str | None) -> Path | None:
    """An adapter from elsewhere, or a base model; its results lie in a new folder below multirun/."""
    of_adapter = settings_of(adapter, overrides) if adapter else []
    named = typed(overrides, "run_name") or typed(overrides, "output_dir")
    name = quoted_text(adapter.absolute().name) if adapter else "${model.name}"
    config = compose([*of_adapter, *([] if named else [f"run_name={name}"]), *overrides], config_dir)
    _require_tasks(config)
    kind = posthoc_evaluation.ADAPTER if adapter else posthoc_evaluation.BASE
    place = str(adapter.absolute()) if adapter else None
    request = posthoc_evaluation.Request(
        asdict(config.eval), asdict(config.slurm), config.device, config.threads, kind, place
    )
    folder = RunFolder(config.output_dir)
    if folder.result.exists():
        raise UserError(f"{folder.path} already holds a run; choose another output_dir")
    result = posthoc_evaluation.result_for(folder.path, request, config)
    cells = posthoc_evaluation.cells_of(request, config, result, folder)
    if not cells:
        raise UserError("eval.baseline=false leaves nothing to ask of a base model; leave it at true")
    posthoc_evaluation.check_cells(cells, request, config, result, folder)
    if config.dry_run:
        _show_missing([(config.run_name, cells)])
        return None
    folder.freeze(config, {})
    posthoc_evaluation.write_request(folder.path, request)
    json_output.record(folder=str(folder.path), made=[], submitted=[], **no_data())
    try:
        return start(folder.path, [(RunRef(folder.path), config)])
    except Exception:
        if not folder.result.exists():  # nothing began
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


def _show_missing(rows: list[tuple[str, EvaluationGrid]]) -> None:
    if json_output.wanted():
        json_output.record(dry_run=True, cells=[{"run": name, **cells.to_dict()} for name, cells in rows])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="to evaluate; nothing is done", title_justify="left")
    for column in ("run", "cells", "which"):
        table.add_column(column, overflow="fold")
    for name, cells in rows:
        table.add_row(name, str(len(cells)), cells.summary())
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def _command(options: argparse.Namespace) -> None:
    places = [i for i in options.items if "=" not in i or Path(i).is_dir()]
    overrides = [i for i in options.items if i not in places]
    if len(places) > 1:
        raise UserError(f"{places[1]}: one folder can be named; settings are written key=value")
    if not options.items:
        raise UserError("name a run's or a sweep's folder, an adapter's, or a model; --help has examples")
    where = evaluate(Path(places[0]) if places else None, overrides, options.config_dir)
    if where is not None:
        show(where)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = Parser(
        "evaluate",
        "Evaluate what is trained already: finished runs, an adapter from elsewhere, a base model alone.",
        "the cells that were made and every result, as one JSON document",
    )
    parser.add_examples(__doc__)
    parser.add_argument(
        "items",
        metavar="DIR | KEY=VALUE",
        nargs="*",
        help="a run, a sweep, a folder above; or an adapter's folder; or a model's. Then settings as for cruijff_kit.train",
    )
    parser.add_argument("--config-dir", metavar="DIR", help="folder with YAML of your own beside ours")
    if os.getcwd() not in sys.path:  # the user's own modules
        sys.path.insert(0, os.getcwd())
    return parser.run(argv, _command)


if __name__ == "__main__":
    raise SystemExit(main())
