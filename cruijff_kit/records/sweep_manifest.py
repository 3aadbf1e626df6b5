"""sweep.json, the manifest of a sweep: its runs, where they are, what identifies them, and every submission.

The launcher and the commands `resume`, `evaluate` and `cancel` write it, the whole file at a time and under a lock. The
runs themselves never do (they keep status.json). A single run that was submitted has a manifest in its own folder.
"""

import dataclasses
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock

from cruijff_kit.config.experiment import ExperimentConfig
from cruijff_kit.config.identity import config_hash
from cruijff_kit.config.run import RunConfig
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import find_above, find_folders
from cruijff_kit.records.versions import code_hash, git_commit
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import write_text
from cruijff_kit.util.format import now

NAME = "sweep.json"
FIRST, RESUME, EVALUATE = "first", "resume", "evaluate"


@dataclass
class Submission:
    """One submission of a run to SLURM."""

    submitted: str
    """When, in UTC."""
    script: str
    """Path of the sbatch script."""
    task: int | None = None
    """The run's number in the job array; None for a job that is no array."""
    job_id: str | None = None
    """SLURM's, such as 17_3; None while (or if) the answer of sbatch is not known."""
    request: dict[str, Any] = field(default_factory=dict)
    """sbatch's options."""
    reason: str = FIRST
    """first, resume or evaluate."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Settings that differ from the submission before."""


@dataclass
class RunEntry:
    """One run of the sweep."""

    name: str
    folder: str
    """Relative to the manifest's folder; absolute for a run that another sweep made (reused)."""
    config_hash: str
    data_hash: str | None
    swept: dict[str, Any] = field(default_factory=dict)
    """The values that distinguish the run in its sweep."""
    reused: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings as in result.json."""
    estimate: dict[str, Any] = field(default_factory=dict)
    """Estimate of its resources (cruijff_kit.runs.estimate.Estimate)."""
    submissions: list[Submission] = field(default_factory=list)


@dataclass
class SweepManifest:
    """A sweep: its plan, the command that made it, its runs."""

    experiment: str
    command: list[str]
    """Arguments of `python -m cruijff_kit.train` (after -m) for the same runs: --config-dir, overrides."""
    cwd: str
    """Folder in which the command was run; relative paths in configs are relative to it."""
    created: str = field(default_factory=now)
    git_commit: str | None = None
    code: str = ""
    """code_hash at submission."""
    question: str = ""
    """The question that the sweep is to answer."""
    hypothesis: str = ""
    """The expected result."""
    evaluation: str = ""
    """The evaluation plan: what is compared, and how."""
    runs: list[RunEntry] = field(default_factory=list)
    version: int = 1


def create_sweep_manifest(experiment: ExperimentConfig, command: list[str]) -> SweepManifest:
    """Make a manifest without runs, of the present code and folder."""
    about = dataclasses.asdict(experiment)
    return SweepManifest(about.pop("name"), command, os.getcwd(), git_commit=git_commit(), code=code_hash(), **about)


def format_command(manifest: SweepManifest) -> str:
    """Return the command line that makes a manifest's runs again, from the folder `cwd`."""
    is_single = len(manifest.runs) == 1 and not manifest.runs[0].swept and manifest.runs[0].folder in (".", "")
    return f"python -m cruijff_kit.train {'' if is_single else '-m '}{shlex.join(manifest.command)}".rstrip()


def read_sweep_manifest(folder: Path) -> SweepManifest | None:
    """Read the manifest in a folder; None if there is none.

    Raises:
        UserError: the file is not a sweep manifest of this version.
    """
    path = folder / NAME
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        runs = [RunEntry(**{**e, "submissions": [Submission(**a) for a in e["submissions"]]}) for e in tree.pop("runs")]
        return SweepManifest(**tree, runs=runs)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a sweep manifest of this version of cruijff_kit: {error}") from error


@contextmanager
def edit_sweep_manifest(folder: Path, new: SweepManifest | None = None) -> Iterator[SweepManifest]:
    """Lock the manifest of a folder against other commands; write it when the context ends without an error.

    Args:
        folder: the sweep's.
        new: used where the folder has no manifest yet.
    Raises:
        UserError: there is none, and `new` is not given.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_path(folder)):
        manifest = read_sweep_manifest(folder) or new
        if manifest is None:
            raise UserError(f"{folder} holds no {NAME}")
        yield manifest
        write_text(folder / NAME, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def lock_path(folder: Path) -> Path:
    """Return the lock that a command holds while it writes a sweep's files."""
    return folder / f".{NAME}.lock"


def resolve_folder(sweep_dir: Path, entry: RunEntry) -> Path:
    """Return the folder where a run lies now."""
    return (sweep_dir / entry.folder).absolute()


def find_sweep_manifests(folder: Path) -> list[Path]:
    """Find the folders of the manifests in and below a folder."""
    return find_folders(folder, NAME)


def find_sweep_above(run: Path) -> Path | None:
    """Find the folder of the sweep that a run belongs to."""
    return find_above(run, NAME)


def is_done(run: Path) -> bool:
    """Return whether a run has finished."""
    path = run / "result.json"
    return path.exists() and read_result(path).status == "done"


def run_identity(config: RunConfig, data_hash: str | None) -> tuple[str, str | None]:
    """Return what makes two runs the same run: the hashes of config and data."""
    return config_hash(config), data_hash
