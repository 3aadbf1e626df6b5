"""conf/torchtune.yaml before it is filled."""

import functools
import re
from collections.abc import Iterator
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf


@functools.cache
def torchtune_template() -> dict[str, Any]:
    """conf/torchtune.yaml before it is filled; not to be changed."""
    text = files("cruijff_kit.conf").joinpath("torchtune.yaml").read_text(encoding="utf-8")
    tree: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(text))
    return tree


def filled_keys() -> Iterator[tuple[str, str]]:
    """(dotted key of the torchtune config, the setting that it is filled from), of keys that are a setting and no more."""
    return _filled_keys(torchtune_template(), "")


def _filled_keys(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _filled_keys(value, f"{prefix}{name}.")
        elif isinstance(value, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", value)):
            yield prefix + name, match[1]
