"""Evaluate what is trained already: `python -m cruijff_kit.evaluate [DIR] [KEY=VALUE ...]`.

python -m cruijff_kit.evaluate multirun/capitalization eval=match                  a sweep's adapters: what is missing
python -m cruijff_kit.evaluate RUN_DIR 'eval.tasks=[my_tasks.py@sums]' eval.epochs=all
python -m cruijff_kit.evaluate ADAPTER_DIR dataset=files dataset.path=my.csv       an adapter that PEFT saved
python -m cruijff_kit.evaluate model=hf_llama model.path=MODEL_DIR                 a base model alone

The cells (run x epoch x task) that finished runs have already are left as they are. What was submitted to SLURM is
evaluated there, in one job for all runs of one base model; slurm.submit=false evaluates it here.
--json: {"folder", "made": [{"run", "task", "epoch", "log"}], "submitted", "runs": as of `table --json`}; with dry_run=true
{"dry_run", "cells"}.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from cruijff_kit import answer
from cruijff_kit.cluster.client import ClusterError
from cruijff_kit.command import Parser
from cruijff_kit.config import EvalConfig, RunConfig, SlurmConfig, literal
from cruijff_kit.errors import UserError, one_line
from cruijff_kit.evaluation.cells import Cells
from cruijff_kit.folder import RunFolder, require_folder
from cruijff_kit.frozen import frozen, permit
from cruijff_kit.ledger import is_done
from cruijff_kit.model_source import model_at, quoted_text, settings_of, typed
from cruijff_kit.progress import progress, say
from cruijff_kit.result import read_result
from cruijff_kit.run_status import ACTIVE, CANCELLED, DONE, FAILED, read_status, write_status
from cruijff_kit.survey import Known, known_below, owner, survey
from cruijff_kit.table import no_data

if TYPE_CHECKING:
    from cruijff_kit.late import Request

# What may differ from the run: its training is done.
_CHANGEABLE = ("eval", "slurm", "device", "threads", "dry_run", "force", "agent", "dataset.permission")


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
    from cruijff_kit import late

    known = known_below(where)
    views, _ = survey(known)
    finished = [(k, v) for k, v in zip(known, views, strict=True) if is_done(k.folder)]
    others = [v.name for v in views if v.folder not in {str(k.folder) for k, _ in finished}]
    if not finished:
        raise UserError(f"{where} has no finished run; python -m cruijff_kit.status {where}")
    if busy := [v.name for _, v in finished if v.state in ACTIVE]:
        raise UserError(f"{', '.join(busy[:3])}: an evaluation is on its way; python -m cruijff_kit.status {where}")
    if others:
        some = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        say(f"left out, because not finished: {some} (python -m cruijff_kit.resume {where})")
    changes, waiting = Changes(overrides, config_dir), []
    with progress("checking", len(finished)) as bar:
        for run, _ in finished:
            folder, was = RunFolder(run.folder), changes.said(frozen(run.folder))
            result, request = read_result(folder.result), changes.request(was)
            # An adapter from elsewhere, or a base model, is what it was.
            request.adapter = result.paths.get("adapter")
            is_base = result.settings["lora.rank"] is None
            request.of = late.ADAPTER if request.adapter else late.BASE if is_base else late.RUN
            config = late.with_request(was, request)
            _require_tasks(config)
            cells = late.cells_of(request, config, result, folder)
            if cells:
                late.check_cells(cells, request, config, result, folder)
            waiting.append((run, request, config, cells))
            bar.advance()
    if changes.dry_run:
        _show_missing([(k.folder.name, cells) for k, _, _, cells in waiting])
        return None
    for run, request, config, cells in waiting:
        if cells and "dataset.permission" in changes.values:
            permit(run.folder, config.dataset.permission)
        if cells:
            late.write_request(run.folder, request)
        else:
            _nothing_waits(run.folder)
    left = [(run, config) for run, _, config, cells in waiting if cells]
    answer.record(folder=str(where.absolute()), made=[], submitted=[], **no_data())
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


def _submissions(run: Known) -> int:
    known = owner(next(k for k in known_below(run.folder) if k.folder == run.folder))
    return len(known.entry.attempts) if known.entry else 0


def _require_tasks(config: RunConfig) -> None:
    if not config.eval.tasks:
        raise UserError("eval.tasks is empty, so there is nothing to evaluate; for example eval=match")


def _nothing_waits(run: Path) -> None:
    """An evaluation that was asked for once, and failed, is no longer wanted."""
    from cruijff_kit.late import NAME

    if (run / NAME).exists():
        (run / NAME).unlink()
        status = read_status(run)
        status.state, status.reason, status.cause = DONE, None, None
        write_status(run, status)


def _alone(adapter: Path | None, overrides: list[str], config_dir: str | None) -> Path | None:
    """An adapter from elsewhere, or a base model; its results lie in a new folder below multirun/."""
    from cruijff_kit import late
    from cruijff_kit.notebook import compose

    of_adapter = settings_of(adapter, overrides) if adapter else []
    named = typed(overrides, "run_name") or typed(overrides, "output_dir")
    name = quoted_text(adapter.absolute().name) if adapter else "${model.name}"
    config = compose([*of_adapter, *([] if named else [f"run_name={name}"]), *overrides], config_dir)
    _require_tasks(config)
    kind = late.ADAPTER if adapter else late.BASE
    place = str(adapter.absolute()) if adapter else None
    request = late.Request(asdict(config.eval), asdict(config.slurm), config.device, config.threads, kind, place)
    folder = RunFolder(config.output_dir)
    if folder.result.exists():
        raise UserError(f"{folder.path} already holds a run; choose another output_dir")
    result = late.result_for(folder.path, request, config)
    cells = late.cells_of(request, config, result, folder)
    if not cells:
        raise UserError("eval.baseline=false leaves nothing to ask of a base model; leave it at true")
    late.check_cells(cells, request, config, result, folder)
    if config.dry_run:
        _show_missing([(config.run_name, cells)])
        return None
    folder.freeze(config, {})
    late.write_request(folder.path, request)
    answer.record(folder=str(folder.path), made=[], submitted=[], **no_data())
    try:
        return start(folder.path, [(Known(folder.path), config)])
    except Exception:
        if not folder.result.exists():  # nothing began
            shutil.rmtree(folder.path, ignore_errors=True)
        raise


class Changes:
    """What the command line changes in the configs of finished runs."""

    def __init__(self, overrides: list[str], config_dir: str | None) -> None:
        """Raises UserError: a key that does not exist, or that cannot change any more."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        from cruijff_kit.hints import explained, unknown_key, valid_keys
        from cruijff_kit.notebook import compose_unresolved

        with explained():
            parsed = OverridesParser.create().parse_overrides(overrides)
        known = valid_keys()
        for o in parsed:
            key = o.key_or_group
            if not {key, key.partition(".")[0]} & {*_CHANGEABLE} and key in known:
                raise UserError(
                    f"{key} belongs to the training, which is done; here {', '.join(_CHANGEABLE)} can differ"
                )
            free = key.startswith(("slurm.additional_parameters.", "eval.task_args."))
            if key not in (*known, *_CHANGEABLE) and not free:
                raise UserError(unknown_key(key))
        self.groups = {o.key_or_group: o.input_line for o in parsed if o.key_or_group in ("eval", "slurm")}
        self.values = {o.key_or_group: o.value() for o in parsed if o.key_or_group not in self.groups}
        self.dry_run, self.again = bool(self.values.get("dry_run")), bool(self.values.get("force"))
        self._composed = compose_unresolved([*self.groups.values()], config_dir) if self.groups else None

    def said(self, config: RunConfig) -> RunConfig:
        """The config with what was said about who gives the command, and who allowed it."""
        config.agent = self.values.get("agent")
        config.dataset.permission = self.values.get("dataset.permission", config.dataset.permission)
        return config

    def request(self, config: RunConfig) -> "Request":
        """What a run of this config is asked for.

        Raises:
            UserError: a value that cannot be.
        """
        from cruijff_kit.late import Request

        groups = {
            name: self._group(name, kind, config) for name, kind in (("eval", EvalConfig), ("slurm", SlurmConfig))
        }
        device, threads = self.values.get("device", config.device), self.values.get("threads", config.threads)
        return Request(groups["eval"], groups["slurm"], device, threads, again=self.again)

    def _group(self, name: str, kind: type, config: RunConfig) -> dict[str, Any]:
        """A group of the run's, or the option that was typed (which may refer to the run's other groups), with the values
        that were typed.
        """
        from cruijff_kit.hints import explained

        with explained():
            tree = OmegaConf.create(literal(asdict(config)))
            if name in self.groups:
                tree[name] = self._composed[name]
            chosen = literal(OmegaConf.to_container(tree[name], resolve=True))
            checked = OmegaConf.create({name: OmegaConf.merge(OmegaConf.structured(kind), chosen)})
            for key, value in self.values.items():
                if key.startswith(f"{name}."):
                    OmegaConf.update(checked, key, value, force_add=True)
            return asdict(OmegaConf.to_object(checked[name]))


def start(where: Path, waiting: list[tuple[Known, RunConfig]]) -> Path | None:
    """Start what waits in the folders of runs: submit it, or do it here.

    Args:
        where: the folder whose table is shown at the end.
        waiting: runs with an evaluate.json, and their configs.
    Returns:
        `where`, if everything is done; None after a submission that is not waited for.
    Raises:
        ClusterError: SLURM refused or does not answer.
        SystemExit: with code 1, after the table, if a cell failed.
    """
    from cruijff_kit.late import base_identity

    # Those of one base model in a row: it is read once.
    waiting = sorted(waiting, key=lambda w: base_identity(w[1]))
    there = [w for w in waiting if w[1].slurm.submit]
    here = [w for w in waiting if not w[1].slurm.submit]
    if there:
        _submit(there)
    failed = _do([run for run, _ in here])
    if there and not there[0][1].slurm.wait:
        return None
    failed += sum(v.state in (FAILED, CANCELLED) for v in survey([run for run, _ in there])[0])
    if failed:
        show(where)
        fix = f"python -m cruijff_kit.status {where} says why; python -m cruijff_kit.resume {where} tries again"
        answer.record(error=answer.error("run", f"the evaluation of {failed} of {len(waiting)} runs failed", fix, 1))
        raise SystemExit(1)
    return where


def _do(runs: list[Known]) -> int:
    """Evaluate here, one run after another; how many failed."""
    from cruijff_kit.late import LateError, evaluate_pending

    failed = 0
    for place, known in enumerate(runs, 1):
        say(f"[{place}/{len(runs)}] {known.folder.name}")
        try:
            evaluate_pending(known.folder)
        except LateError as error:
            failed += 1
            say(f"[{place}/{len(runs)}] {known.folder.name} failed: {one_line(error)}")
    return failed


def _submit(waiting: list[tuple[Known, RunConfig]]) -> None:
    from cruijff_kit.cluster.request import sbatch_options
    from cruijff_kit.cluster.submit import Submission, submit
    from cruijff_kit.late import base_identity
    from cruijff_kit.launch.cluster import refuse_rest, report
    from cruijff_kit.ledger import read_ledger

    ledgers: dict[Path, dict[str, list[tuple[Known, RunConfig]]]] = {}
    for known, config in waiting:
        ledger = _ledger_of(known, config)
        key = json.dumps([base_identity(config), sbatch_options(config)], default=str)
        ledgers.setdefault(ledger, {}).setdefault(key, []).append((known, config))
    for ledger, groups in ledgers.items():
        submissions = [
            Submission(part[0], sbatch_options(config), config.slurm.max_parallel, "evaluate", together=part)
            for group in groups.values()
            for config in [group[0][1]]
            for part in _parts([k.folder for k, _ in group], config.slurm.max_parallel or 1)
        ]
        outcome = submit(submissions, ledger, read_ledger(ledger).cwd)
        report(outcome, ledger)
        if waiting[0][1].slurm.wait:
            from cruijff_kit.launch.wait import wait_for

            wait_for(ledger, [folder for s in submissions for folder in s.folders])
        refuse_rest(outcome, ledger)


def _parts(folders: list[Path], most: int) -> Iterator[list[Path]]:
    """As many lists of like length as may run at once."""
    number = min(most, len(folders))
    for n in range(number):
        yield folders[n * len(folders) // number : (n + 1) * len(folders) // number]


def _ledger_of(known: Known, config: RunConfig) -> Path:
    """The ledger that a run stands in; one is made in its own folder if there is none."""
    from cruijff_kit.ledger import Entry, editing, new_ledger

    known = owner(known)
    if known.sweep_dir is not None:
        return known.sweep_dir
    result = RunFolder(known.folder).result
    made = read_result(result) if result.exists() else None
    identity = (made.config_hash, made.data_hash) if made else ("", None)  # of an evaluation alone: like no run
    with editing(known.folder, new_ledger(config.experiment, sys.argv[1:])) as ledger:
        ledger.runs.append(Entry(config.run_name, ".", *identity))
    return known.folder


def _show_missing(rows: list[tuple[str, Cells]]) -> None:
    if answer.wanted():
        answer.record(dry_run=True, cells=[{"run": name, **cells.as_data()} for name, cells in rows])
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="to evaluate; nothing is done", title_justify="left")
    for column in ("run", "cells", "which"):
        table.add_column(column, overflow="fold")
    for name, cells in rows:
        table.add_row(name, str(len(cells)), cells.in_words())
    Console(width=None if sys.stdout.isatty() else 200, highlight=False).print(table)


def show(where: Path) -> None:
    """Bring each results.csv up to date and print the table (or record the results)."""
    from cruijff_kit.ledger import find_ledgers
    from cruijff_kit.summary import write_overviews
    from cruijff_kit.table import answer_or_show

    above = [place for place in (where, *[*where.absolute().parents][:2]) if (place / "results.csv").exists()]
    for place in dict.fromkeys(p.absolute() for p in (*find_ledgers(where), *above)):
        write_overviews(place)
    answer_or_show(where)


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
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n" + "\n".join(f"  {line}" for line in __doc__.splitlines() if line.startswith("python")),
    )
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
