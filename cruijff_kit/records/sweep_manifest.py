"""sweep.json: the manifest of a sweep. Which runs it has, where they are, what identifies them, and every submission.

The launcher and the commands `resume` and `cancel` write it, the whole file at a time and under a lock; the runs
themselves never do (they keep status.json). A single run that was submitted has a manifest in its own folder.
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
from cruijff_kit.records.run_folder import folders_below
from cruijff_kit.records.versions import code_hash, git_commit
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import write_text
from cruijff_kit.util.format import now

NAME = "sweep.json"
FIRST, RESUME, EVALUATE = "first", "resume", "evaluate"


@dataclass
class Submission:
    """One submission of a run.

    script: what was submitted. task: the run's number in the array, None for a job of one run. job_id: SLURM's, such as
    17_3; None while (or if) the answer of sbatch is not known. request: sbatch's options. reason: first, resume
    or evaluate.
    changes: the settings that differ from the attempt before.
    """

    submitted: str
    script: str
    task: int | None = None
    job_id: str | None = None
    request: dict[str, Any] = field(default_factory=dict)
    reason: str = FIRST
    changes: dict[str, Any] = field(default_factory=dict)


@dataclass
class RunEntry:
    """One run of the sweep.

    folder: relative to the manifest's, or absolute for a run that an earlier sweep made (reused). settings: as in
    result.json. estimate: what it was expected to take (cruijff_kit.runs.estimate).
    """

    name: str
    folder: str
    config_hash: str
    data_hash: str | None
    swept: dict[str, Any] = field(default_factory=dict)
    reused: bool = False
    settings: dict[str, Any] = field(default_factory=dict)
    estimate: dict[str, Any] = field(default_factory=dict)
    submissions: list[Submission] = field(default_factory=list)


@dataclass
class SweepManifest:
    """A sweep."""

    experiment: str
    command: list[str]
    """What to type after `python -m cruijff_kit.train` (and -m) for the same runs: --config-dir, overrides."""
    cwd: str
    """Where the command was given; relative paths in configs count from there."""
    created: str = field(default_factory=now)
    git_commit: str | None = None
    code: str = ""
    """code_hash at submission."""
    question: str = ""
    """What the sweep is to answer."""
    hypothesis: str = ""
    """What is expected."""
    evaluation: str = ""
    """What will be compared, and how: the evaluation plan."""
    runs: list[RunEntry] = field(default_factory=list)
    version: int = 1


def create_sweep_manifest(experiment: ExperimentConfig, command: list[str]) -> SweepManifest:
    """A manifest without runs, of the code and the folder of this moment."""
    about = dataclasses.asdict(experiment)
    return SweepManifest(about.pop("name"), command, os.getcwd(), git_commit=git_commit(), code=code_hash(), **about)


def format_command(manifest: SweepManifest) -> str:
    """The command line that makes a manifest's runs again, from the folder `cwd`."""
    alone = len(manifest.runs) == 1 and not manifest.runs[0].swept and manifest.runs[0].folder in (".", "")
    return f"python -m cruijff_kit.train {'' if alone else '-m '}{shlex.join(manifest.command)}".rstrip()


def read_sweep_manifest(folder: Path) -> SweepManifest | None:
    """The manifest in a folder; None if there is none.

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
    """The manifest of a folder, locked against other commands, and written when the context ends without an error.

    Args:
        folder: the sweep's.
        new: begin with this one if there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(lock_path(folder)):
        manifest = read_sweep_manifest(folder) or new
        if manifest is None:
            raise UserError(f"{folder} holds no {NAME}")
        yield manifest
        write_text(folder / NAME, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def lock_path(folder: Path) -> Path:
    """What a command locks that writes a sweep's files."""
    return folder / f".{NAME}.lock"


def resolve_folder(sweep_dir: Path, entry: RunEntry) -> Path:
    """Where a run lies now."""
    return (sweep_dir / entry.folder).absolute()


def find_sweep_manifests(folder: Path) -> list[Path]:
    """Folders of the manifests in and below a folder."""
    return folders_below(folder, NAME)


def is_done(run: Path) -> bool:
    """Whether a run has finished."""
    path = run / "result.json"
    return path.exists() and read_result(path).status == "done"


def run_identity(config: RunConfig, data_hash: str | None) -> tuple[str, str | None]:
    """What makes two runs the same run."""
    return config_hash(config), data_hash
