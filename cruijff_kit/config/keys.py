"""List every key of a run's configuration, and explain unknown keys."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from cruijff_kit.util.suggest import find_nearest


def describe_unknown_key(full_key: str, location: str = "") -> str:
    """Return the message for an unknown key: it suggests the nearest key, else lists the keys of the same group.

    Args:
        full_key: the dotted key.
        location: " in FILE" for a key of a file.
    """
    parent, _, name = full_key.rpartition(".")
    known = valid_keys()
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    near = siblings.get(find_nearest(name, [*siblings]) or "") or _same_last_name(full_key, known)
    near = near or (None if siblings else find_nearest(full_key, known))
    if location and parent and near == name:
        return f"unknown key {full_key}{location}; for {name} itself the file must open with '# @package _global_'"
    if near:
        return f"unknown key {full_key}{location}; did you mean {near}?"
    if siblings:
        return f"unknown key {full_key}{location}; valid: {', '.join(sorted(siblings.values()))}"
    return f"unknown key {full_key}{location}; `--cfg job` prints every key"


def valid_keys() -> list[str]:
    """Return every dotted key of a run, groups included."""
    from cruijff_kit.config.run import RunConfig
    from cruijff_kit.config.torchtune_template import torchtune_template

    return list(_dataclass_keys(RunConfig, "")) + list(_tree_keys(torchtune_template(), "torchtune."))


def _dataclass_keys(cls: type, prefix: str) -> Iterator[str]:
    for f in dataclasses.fields(cls):
        yield prefix + f.name
        if isinstance(f.type, type) and dataclasses.is_dataclass(f.type):
            yield from _dataclass_keys(f.type, f"{prefix}{f.name}.")
        elif f.default_factory is not dataclasses.MISSING and isinstance(defaults := f.default_factory(), dict):
            yield from _tree_keys(defaults, f"{prefix}{f.name}.")


def _tree_keys(tree: dict[str, Any], prefix: str) -> Iterator[str]:
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from _tree_keys(value, f"{prefix}{key}.")


def _same_last_name(full_key: str, known: list[str]) -> str | None:
    last = full_key.rpartition(".")[2]
    return next((k for k in known if k.rpartition(".")[2] == last and not k.startswith("torchtune.")), None)
