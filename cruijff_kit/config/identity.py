"""Hash the settings that identify a run."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from typing import Any

from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.torchtune_template import filled_keys


def config_hash(config: RunConfig) -> str:
    """Hash everything that a run computes from, in 16 hex digits; where it runs and its name do not count."""
    return _hash(config, {*unidentifying_keys(RunConfig)})


def configuration_hash(config: RunConfig) -> str:
    """Hash as `config_hash` does, without the seed: the same for all runs of one configuration."""
    return _hash(config, {*unidentifying_keys(RunConfig), "seed"})


def unidentifying_keys(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted settings that are not part of a run's identity (field metadata ``"identity": False``)."""
    for field in dataclasses.fields(cls):
        if not field.metadata.get("identity", True):
            yield prefix + field.name
        elif isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from unidentifying_keys(field.type, f"{prefix}{field.name}.")


def _hash(config: RunConfig, ignored_keys: set[str]) -> str:
    tree = dataclasses.asdict(config)
    for key in ignored_keys:
        _remove(tree, key)
    for key, setting in filled_keys():
        if setting in ignored_keys and setting != "output_dir":  # other keys contain output_dir; it is replaced below
            _remove(tree, f"torchtune.{key}")
    _remove(tree, "torchtune.trackers")
    # An edited task file makes another run.
    files = [name.file for name in config.eval.names if name.file is not None and name.file.is_file()]
    tree["eval"]["files"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    text = json.dumps(tree, sort_keys=True, default=str).replace(config.output_dir, "<output_dir>")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _remove(tree: dict[str, Any], key: str) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        tree = tree.get(parent, {})
    tree.pop(name, None)
