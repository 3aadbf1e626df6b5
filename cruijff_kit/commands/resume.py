"""Go on with what is not done: `cruijff-kit resume DIR [slurm.KEY=VALUE ...]`.

DIR is a run, a sweep, or a folder above them. Each run that is neither done nor on its way goes on from its newest
checkpoint, or starts if it has none, with the configuration that was frozen when it was first started: on SLURM what was
submitted, here what ran here. Only the slurm group may be changed: slurm.time=04:00:00, slurm.submit=false to run here.
--json: {"folder", "to_finish", "on_their_way", "submitted", "made", "runs": as of `table --json`, "states"}.
"""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from cruijff_kit.analysis.results_frame import no_data
from cruijff_kit.analysis.summary import refresh_above, write_overviews, write_summary
from cruijff_kit.commands.base import Parser
from cruijff_kit.config import data_policy
from cruijff_kit.config.explain import explained
from cruijff_kit.config.keys import unknown_key, valid_keys
from cruijff_kit.config.run import RunConfig
from cruijff_kit.records import failures
from cruijff_kit.records.run_status import ACTIVE, DONE
from cruijff_kit.records.saved_config import frozen, frozen_swept, permit
from cruijff_kit.records.sweep_manifest import RESUME, read_sweep_manifest
from cruijff_kit.runs.multi_lora_runs import PackedRun, packs_of, run_pack
from cruijff_kit.runs.posthoc_evaluation import read_request, write_request
from cruijff_kit.runs.run import train_then_eval
from cruijff_kit.slurm.request import double_memory
from cruijff_kit.slurm.run_states import RunInfo, RunRef, collect_states, find_runs
from cruijff_kit.sweep.finish import print_summary
from cruijff_kit.sweep.on_slurm import print_submitted, reject_remaining
from cruijff_kit.sweep.slurm_jobs import make_job_requests
from cruijff_kit.sweep.start_posthoc import show, start
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import ClusterError, UserError, one_line
from cruijff_kit.util.progress import say


def resume(folder: Path, overrides: list[str]) -> None:
    """Finish the runs below a folder: submit them, or run them here and show the table.

    Raises:
        UserError: no run there, or one that cannot go on.
        ClusterError: SLURM refused or does not answer.
        SystemExit: with code 1, after the table, if a run failed again.
    """
    changed, said = _overrides(overrides)
    runs = find_runs(folder)
    infos, trouble = collect_states(runs)
    if trouble and any(v.state in ACTIVE and v.job_id for v in infos):
        raise ClusterError(f"whether the submitted runs are still on their way cannot be told: {trouble}")
    active = [v for v in infos if v.state in ACTIVE]
    left = [(k, v) for k, v in zip(runs, infos, strict=True) if v.state not in (DONE, *ACTIVE)]
    on_their_way = f"; {len(active)} on their way" if active else ""
    say(
        (f"{len(left)} runs to finish" if left else "nothing to finish" if active else "every run is done")
        + on_their_way
    )
    json_output.record(to_finish=[v.name for _, v in left], on_their_way=[v.name for v in active])
    json_output.record(folder=str(folder.absolute()), submitted=[], made=[], **no_data())
    try:
        _finish(folder, left, changed, said)
    finally:
        if json_output.wanted():
            json_output.record(states=_states(find_runs(folder)))


def _states(runs: list[RunRef]) -> list[dict[str, Any]]:
    keys = ("name", "folder", "state", "reason", "job_id")
    return [{key: getattr(info, key) for key in keys} for info in collect_states(runs)[0]]


def _finish(folder: Path, left: list[tuple[RunRef, RunInfo]], changed: dict[str, Any], said: dict[str, Any]) -> None:
    waiting = [(k, v) for k, v in left if read_request(k.folder)]
    left = [w for w in left if w not in waiting]
    if waiting:
        _evaluate_again(folder, waiting, changed, said)
        if not left:
            return
    configs = {k.folder: _admitted(k.folder, frozen(k.folder, changed), said) for k, _ in left}
    _write_permission(configs, said)
    there = [(k, v) for k, v in left if configs[k.folder].slurm.submit]
    here = [k for k, _ in left if not configs[k.folder].slurm.submit]
    for sweep_dir in dict.fromkeys(k.sweep_dir or k.folder for k, _ in there):
        _submit_again(sweep_dir, [(k, v) for k, v in there if (k.sweep_dir or k.folder) == sweep_dir], configs)
    if here or not left:
        _run_here(folder, here, configs)


def _admitted(run: Path, config: RunConfig, said: dict[str, Any]) -> RunConfig:
    """The config with what was said about who gives the command. Raises UserError as tiers.admit."""
    config.agent = said.get("agent")
    config.dataset.permission = said.get("dataset.permission", config.dataset.permission)
    try:
        data_policy.admit(config)
    except UserError as error:
        raise UserError(f"{run}: {error}") from error
    return config


def _write_permission(runs: Iterable[Path], said: dict[str, Any]) -> None:
    if "dataset.permission" in said:
        for run in runs:
            permit(run, said["dataset.permission"])


def _evaluate_again(
    folder: Path, waiting: list[tuple[RunRef, RunInfo]], changed: dict[str, Any], said: dict[str, Any]
) -> None:
    """Go on with post-hoc evaluations, as cruijff-kit evaluate asked for them."""
    configs = []
    for known, _ in waiting:
        _admitted(known.folder, read_request(known.folder).config(known.folder), said)
    _write_permission([known.folder for known, _ in waiting], said)
    for known, info in waiting:
        request = read_request(known.folder)
        mem = _more_memory(info, request.slurm["mem"])
        request.slurm |= ({"mem": mem} if mem else {}) | changed
        write_request(known.folder, request)
        configs.append((known, request.config(known.folder)))
    if start(folder, configs) is not None:
        show(folder)


def _overrides(overrides: list[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What changes of the slurm group, and what is said about who gives the command."""
    changed, said = {}, {}
    known = valid_keys()
    with explained():
        for override in OverridesParser.create().parse_overrides(overrides):
            key = override.key_or_group
            if key in ("agent", "dataset.permission"):
                said[key] = override.value()
                continue
            if not key.startswith("slurm."):
                raise UserError(f"{key} cannot change in a run that has begun, only slurm.* can; start a new run")
            if key not in known and not key.startswith("slurm.additional_parameters."):
                raise UserError(unknown_key(key))
            changed[key.removeprefix("slurm.")] = override.value()
    return changed, said


def _submit_again(sweep_dir: Path, runs: list[tuple[RunRef, RunInfo]], configs: dict[Path, RunConfig]) -> None:
    from cruijff_kit.slurm.submit import submit

    changes = [_changes(info, configs[known.folder]) for known, info in runs]
    mem = [(info.changes | change).get("slurm.mem") for (_, info), change in zip(runs, changes, strict=True)]
    jobs = []
    for asked in dict.fromkeys(mem):  # runs of a pack ask for the same
        some = [n for n, m in enumerate(mem) if m == asked]
        folders = [runs[n][0].folder for n in some]
        for job in make_job_requests([configs[f] for f in folders], folders, [None] * len(some)):
            job.options |= {"mem": asked} if asked else {}
            job.reason, job.changes = RESUME, changes[some[folders.index(job.runs[0])]]
            jobs.append(job)
    result = submit(jobs, sweep_dir, read_sweep_manifest(sweep_dir).cwd)
    print_submitted(result, sweep_dir)
    write_summary(sweep_dir)
    reject_remaining(result, sweep_dir)


def _changes(info: RunInfo, config: RunConfig) -> dict[str, Any]:
    mem = _more_memory(info, info.changes.get("slurm.mem") or config.slurm.mem)
    return {"slurm.mem": mem} if mem else {}


def _more_memory(info: RunInfo, mem: str | None) -> str | None:
    """What a run that failed for want of memory is given; None for any other."""
    return double_memory(mem, None) if info.cause == failures.OUT_OF_MEMORY else None


def _run_here(folder: Path, runs: list[RunRef], configs: dict[Path, RunConfig]) -> None:
    folders = [known.folder for known in runs]
    try:
        for pack in plan_groups([configs[run] for run in folders]):
            if len(pack.runs) > 1:
                say(pack.summary(len(runs)))
                packed = [
                    GroupRun(configs[folders[n]], frozen_swept(folders[n]), f"[{n + 1}/{len(runs)}] ")
                    for n in pack.runs
                ]
                run_group(packed, pack.at_once)
            else:
                _run_alone(folders[pack.runs[0]], configs, f"[{pack.runs[0] + 1}/{len(runs)}]")
    finally:
        interrupted = sys.exc_info()[0] is not None
        sweeps = {known.sweep_dir for known in runs if known.sweep_dir} - {folder.absolute()}
        for sweep_dir in () if interrupted else sweeps:
            write_overviews(sweep_dir)
        try:
            print_summary(folder)
        except SystemExit:
            if not interrupted:
                raise


def _run_alone(run: Path, configs: dict[Path, RunConfig], place: str) -> None:
    say(f"{place} {run.name}")
    try:
        train_then_eval(configs[run], frozen_swept(run))
    except Exception as error:
        say(f"{place} {run.name} failed: {one_line(error)}")
    refresh_above(run)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = Parser("resume", "Finish what is not done.", "what was submitted or run, as one JSON document")
    parser.add_argument("folder", metavar="DIR", type=Path, help="a run's or a sweep's folder, or one above")
    parser.add_argument("overrides", metavar="slurm.KEY=VALUE", nargs="*", help="what to ask the cluster for now")
    return parser.run(argv, lambda options: resume(options.folder, options.overrides))


if __name__ == "__main__":
    raise SystemExit(main())
