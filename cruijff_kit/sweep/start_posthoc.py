"""Start evaluations of runs that are trained already: here or on SLURM."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from cruijff_kit.analysis.results_table import answer_or_show
from cruijff_kit.analysis.summary import write_overviews
from cruijff_kit.config.compose import compose_unresolved
from cruijff_kit.config.explain import explained
from cruijff_kit.config.groups import EvalConfig
from cruijff_kit.config.keys import unknown_key, valid_keys
from cruijff_kit.config.loading import literal
from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.slurm import SlurmConfig
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.run_status import CANCELLED, FAILED
from cruijff_kit.records.sweep_manifest import (
    EVALUATE,
    RunEntry,
    create_sweep_manifest,
    edit_sweep_manifest,
    find_sweep_manifests,
    read_sweep_manifest,
)
from cruijff_kit.runs.posthoc_evaluation import EvaluationJobError, Request, base_identity, evaluate_pending
from cruijff_kit.slurm.request import sbatch_options
from cruijff_kit.slurm.run_states import RunRef, collect_states, find_origin
from cruijff_kit.sweep.on_slurm import print_submitted, reject_remaining
from cruijff_kit.sweep.wait import wait_for
from cruijff_kit.util import json_output
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.progress import say

if TYPE_CHECKING:
    from cruijff_kit.runs.posthoc_evaluation import Request


# What may differ from the run: its training is done.
_CHANGEABLE = ("eval", "slurm", "device", "threads", "dry_run", "force", "agent", "dataset.permission")


class Changes:
    """What the command line changes in the configs of finished runs."""

    def __init__(self, overrides: list[str], config_dir: str | None) -> None:
        """Raises UserError: a key that does not exist, or that cannot change any more."""
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
        groups = {
            name: self._group(name, kind, config) for name, kind in (("eval", EvalConfig), ("slurm", SlurmConfig))
        }
        device, threads = self.values.get("device", config.device), self.values.get("threads", config.threads)
        return Request(groups["eval"], groups["slurm"], device, threads, again=self.again)

    def _group(self, name: str, kind: type, config: RunConfig) -> dict[str, Any]:
        """A group of the run's, or the option that was typed (which may refer to the run's other groups), with the values
        that were typed.
        """
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


def start(where: Path, waiting: list[tuple[RunRef, RunConfig]]) -> Path | None:
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
    # Those of one base model in a row: it is read once.
    waiting = sorted(waiting, key=lambda w: base_identity(w[1]))
    there = [w for w in waiting if w[1].slurm.submit]
    here = [w for w in waiting if not w[1].slurm.submit]
    if there:
        _submit(there)
    failed = _do([run for run, _ in here])
    if there and not there[0][1].slurm.wait:
        return None
    failed += sum(v.state in (FAILED, CANCELLED) for v in collect_states([run for run, _ in there])[0])
    if failed:
        show(where)
        fix = f"cruijff-kit status {where} says why; cruijff-kit resume {where} tries again"
        json_output.record(
            error=json_output.error("run", f"the evaluation of {failed} of {len(waiting)} runs failed", fix, 1)
        )
        raise SystemExit(1)
    return where


def _do(runs: list[RunRef]) -> int:
    """Evaluate here, one run after another; how many failed."""
    failed = 0
    for place, known in enumerate(runs, 1):
        say(f"[{place}/{len(runs)}] {known.folder.name}")
        try:
            evaluate_pending(known.folder)
        except EvaluationJobError as error:
            failed += 1
            say(f"[{place}/{len(runs)}] {known.folder.name} failed: {one_line(error)}")
    return failed


def _submit(waiting: list[tuple[RunRef, RunConfig]]) -> None:
    from cruijff_kit.slurm.submit import JobRequest, submit

    manifests: dict[Path, dict[str, list[tuple[RunRef, RunConfig]]]] = {}
    for known, config in waiting:
        manifest = _manifest_folder(known, config)
        key = json.dumps([base_identity(config), sbatch_options(config)], default=str)
        manifests.setdefault(manifest, {}).setdefault(key, []).append((known, config))
    for manifest, groups in manifests.items():
        jobs = [
            JobRequest(part, sbatch_options(config), config.slurm.max_parallel, EVALUATE)
            for group in groups.values()
            for config in [group[0][1]]
            for part in _parts([k.folder for k, _ in group], config.slurm.max_parallel or 1)
        ]
        result = submit(jobs, manifest, read_sweep_manifest(manifest).cwd)
        print_submitted(result, manifest)
        if waiting[0][1].slurm.wait:
            wait_for(manifest, [folder for job in jobs for folder in job.runs])
        reject_remaining(result, manifest)


def _parts(folders: list[Path], most: int) -> Iterator[list[Path]]:
    """As many lists of like length as may run at once."""
    number = min(most, len(folders))
    for n in range(number):
        yield folders[n * len(folders) // number : (n + 1) * len(folders) // number]


def _manifest_folder(known: RunRef, config: RunConfig) -> Path:
    """The manifest that a run stands in; one is made in its own folder if there is none."""
    known = find_origin(known)
    if known.sweep_dir is not None:
        return known.sweep_dir
    result = RunFolder(known.folder).result
    made = read_result(result) if result.exists() else None
    identity = (made.config_hash, made.data_hash) if made else ("", None)  # of an evaluation alone: like no run
    with edit_sweep_manifest(known.folder, create_sweep_manifest(config.experiment, sys.argv[1:])) as manifest:
        manifest.runs.append(RunEntry(config.run_name, ".", *identity))
    return known.folder


def show(where: Path) -> None:
    """Bring each results.csv up to date and print the table (or record the results)."""
    above = [place for place in (where, *[*where.absolute().parents][:2]) if (place / "results.csv").exists()]
    for place in dict.fromkeys(p.absolute() for p in (*find_sweep_manifests(where), *above)):
        write_overviews(place)
    answer_or_show(where)
