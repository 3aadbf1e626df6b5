"""conf/torchtune.yaml before it is filled."""

import functools
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf


@functools.cache
def torchtune_template() -> dict[str, Any]:
    """conf/torchtune.yaml before it is filled; not to be changed."""
    text = files("cruijff_kit.conf").joinpath("torchtune.yaml").read_text(encoding="utf-8")
    tree: dict[str, Any] = OmegaConf.to_container(OmegaConf.create(text))
    return tree
