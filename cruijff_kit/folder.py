"""The folder of one run: everything that a run writes goes through here.

multirun/<experiment>/<time>/<run>/
    config.yaml       the composed config, resolved          torchtune.yaml   what the recipe received
    swept.json        what distinguishes the run             checkpoint/      a state to resume from, while unfinished
    metrics.jsonl     a line per logged step                 epoch_0/ ...     adapters in PEFT's format
    eval/             inspect-ai logs                        result.json      RunResult, written last (also on failure)
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf


class RunFolder:
    """Paths inside a run's folder, and atomic writing: a reader sees the old file or the new one, never a half."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    @property
    def result(self) -> Path:
        """result.json"""
        return self.path / "result.json"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl"""
        return self.path / "metrics.jsonl"

    @property
    def eval(self) -> Path:
        """Folder of evaluation logs."""
        return self.path / "eval"

    @property
    def checkpoints(self) -> Path:
        """Folder of the states that an unfinished run goes on from; removed when the run is done."""
        return self.path / "checkpoint"

    def epoch(self, number: int) -> Path:
        """Folder of the adapter saved after an epoch, counted from 0."""
        return self.path / f"epoch_{number}"

    def write(self, name: str, text: str) -> Path:
        """Write a text file whole or not at all."""
        return write_text(self.path / name, text)

    def freeze(self, config: Any, swept: dict[str, Any]) -> None:
        """Write a run's config (a RunConfig) and what distinguishes it in its sweep, before it starts."""
        self.write_yaml("config.yaml", dataclasses.asdict(config))
        self.write("swept.json", json.dumps(swept) + "\n")

    def write_yaml(self, name: str, tree: dict) -> Path:
        """Write a tree as YAML."""
        return self.write(name, OmegaConf.to_yaml(OmegaConf.create(tree)))


def discard_unused(path: str | Path) -> None:
    """Remove the folder that Hydra made for something that never started; any other content keeps it.

    A folder above it (the time stamp's) goes with it when that leaves it empty.
    """
    folder = Path(path).absolute()
    hydras_own = {".hydra", "train.log", "multirun.yaml"}
    if folder.is_dir() and {p.name for p in folder.iterdir()} <= hydras_own:
        shutil.rmtree(folder)
        if folder.parent != Path.cwd() and not any(folder.parent.iterdir()):
            folder.parent.rmdir()


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file whole or not at all, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
    return path
