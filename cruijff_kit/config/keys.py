"""Every key of a run's configuration, and what to say of one that does not exist."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from cruijff_kit.util.suggest import find_nearest


def unknown_key(full_key: str, where: str = "") -> str:
    """Say that a key does not exist, with the nearest one that does, else with its neighbours.

    Args:
        full_key: dotted.
        where: " in FILE", if it stands in a file.
    """
    parent, _, name = full_key.rpartition(".")
    known = valid_keys()
    siblings = {k.rpartition(".")[2]: k for k in known if k.rpartition(".")[0] == parent}
    near = siblings.get(find_nearest(name, [*siblings]) or "") or _same_last_name(full_key, known)
    near = near or (None if siblings else find_nearest(full_key, known))
    if where and parent and near == name:
        return f"unknown key {full_key}{where}; for {name} itself the file must open with '# @package _global_'"
    if near:
        return f"unknown key {full_key}{where}; did you mean {near}?"
    if siblings:
        return f"unknown key {full_key}{where}; valid: {', '.join(sorted(siblings.values()))}"
    return f"unknown key {full_key}{where}; `--cfg job` prints every key"


def valid_keys() -> list[str]:
    """Every key of a run, dotted, groups included."""
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
