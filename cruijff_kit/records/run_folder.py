"""The folder of one run: everything that a run writes goes through here.

multirun/<experiment>/<time>/<run>/
    config.yaml       the composed config, resolved          torchtune.yaml   what the recipe received
    swept.json        what distinguishes the run             checkpoint/      a state to resume from, while unfinished
    metrics.jsonl     a line per logged step                 epoch_0/ ...     adapters in PEFT's format
    eval/             inspect-ai logs                        merged/epoch_0/  whole models, where asked for
    status.json       RunStatus: what the run is doing       result.json      RunResult, written last (also on failure)
    environment.json  what it was made with                  provenance/      code that no commit holds
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from cruijff_kit.data import tiers
from cruijff_kit.models.adapter_files import ADAPTER_CONFIG
from cruijff_kit.util import files
from cruijff_kit.util.files import write_text

_OF_A_RUN = {"swept.json", "status.json", "result.json"}


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]
    """Quotes the strings that OmegaConf would read as numbers or booleans, as OmegaConf's own (slow) dumper does."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    with contextlib.suppress(ValueError):
        float(text)
        return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="'")
    return dumper.represent_str(text)


_Dumper.add_representer(str, _text)
_Dumper.ignore_aliases = lambda self, data: True


class RunFolder:
    """Paths inside a run's folder, and atomic writing: a reader sees the old file or the new one, never a half."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    @property
    def result(self) -> Path:
        """result.json"""
        return self.path / "result.json"

    @property
    def status(self) -> Path:
        """status.json"""
        return self.path / "status.json"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl"""
        return self.path / "metrics.jsonl"

    @property
    def validation_losses(self) -> Path:
        """validation_losses.json: of the last epoch, by row of the validation split."""
        return self.path / "validation_losses.json"

    @property
    def eval(self) -> Path:
        """Folder of evaluation logs."""
        return self.path / "eval"

    @property
    def base_model_eval(self) -> Path:
        """Folder of the evaluation logs of the base model."""
        return self.eval / "base_model"

    @property
    def checkpoints(self) -> Path:
        """Folder of the states that an unfinished run goes on from; removed when the run is done."""
        return self.path / "checkpoint"

    def epoch(self, number: int) -> Path:
        """Folder of the adapter saved after an epoch, counted from 0."""
        return self.path / f"epoch_{number}"

    def epochs(self) -> list[int]:
        """Epochs whose adapters are saved, counted from 0, in order."""
        numbers = [parse_epoch(path.parent.name) for path in self.path.glob(f"epoch_*/{ADAPTER_CONFIG}")]
        return sorted(n for n in numbers if n is not None)

    def merged(self, number: int) -> Path:
        """Folder of the whole model after an epoch, counted from 0."""
        return self.path / "merged" / f"epoch_{number}"

    def discard_partial_logs(self, keep: Iterable[str] = ()) -> None:
        """Remove what an evaluation that was cut short left: every log but those to keep."""
        names = {Path(log).name for log in keep}
        for log in self.eval.glob("*.eval"):
            if log.name not in names:
                log.unlink()
        for together in self.eval.glob(".together-*"):  # where several runs' logs were written
            shutil.rmtree(together)

    def write(self, name: str, text: str) -> Path:
        """Write a text file whole or not at all."""
        return write_text(self.path / name, text)

    def freeze(self, config: Any, swept: dict[str, Any]) -> None:
        """Write a run's config (a RunConfig) and what distinguishes it in its sweep, before it starts.

        Folders of red data become the owner's alone.
        """
        if config.dataset.tier == tiers.RED:
            files.make_private(self.path, config.experiment.name)
        # Without `agent`, which a SLURM job sets to False whoever submitted it.
        self.write_yaml("config.yaml", dataclasses.asdict(config) | {"agent": None})
        self.write("swept.json", json.dumps(swept) + "\n")

    def write_yaml(self, name: str, tree: dict[str, Any]) -> Path:
        """Write a tree as YAML."""
        return self.write(name, yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def parse_epoch(name: str) -> int | None:
    """Return N of a folder's name epoch_N; None for any other name."""
    number = name.removeprefix("epoch_")
    return int(number) if name.startswith("epoch_") and number.isdigit() else None


def discard_unused(path: str | Path) -> None:
    """Remove the folder that Hydra made for something that never started; any other content keeps it.

    Folders above it, as far as the present one, go with it when that leaves them empty.
    """
    folder = Path(path).absolute()
    hydras_own = {".hydra", "train.log", "multirun.yaml"}
    if not folder.is_dir() or not {p.name for p in folder.iterdir()} <= hydras_own:
        return
    shutil.rmtree(folder)
    for above in folder.parents:
        if above == Path.cwd() or not above.is_relative_to(Path.cwd()) or any(above.iterdir()):
            return
        above.rmdir()


def find_folders(folder: Path, *names: str) -> list[Path]:
    """Find the folders in and below a folder that hold a file of one of these names, sorted; runs are not searched.

    Unlike Path.rglob, tolerates folders that are deleted during the walk.
    """
    folders = []
    for place, below, names_there in os.walk(folder):
        if not set(names).isdisjoint(names_there):
            folders.append(Path(place).absolute())
        if not _OF_A_RUN.isdisjoint(names_there):
            below.clear()
    return sorted(folders)


def find_above(run: Path, name: str) -> Path | None:
    """Return the nearest folder that holds a file of this name: a run's own or one of the three above it."""
    run = run.absolute()
    return next((folder for folder in [run, *run.parents][:4] if (folder / name).exists()), None)


def find_experiment_folder(folder: Path, experiment: str) -> Path | None:
    """Return the folder of an experiment above that of its sweep, or of its single run, which lies deeper."""
    return next((above for above in [*folder.absolute().parents][:2] if above.name == experiment), None)
