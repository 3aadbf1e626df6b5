"""What the runs of one process share: the tokenizer, the tokenised splits, the model's outline, once per distinct setting.

(The base model's weights are shared by `models.base`.)
"""

import json
from typing import Any

import torch
from omegaconf import OmegaConf

from cruijff_kit.data.dataset_files import version
from cruijff_kit.models import base_model
from cruijff_kit.models.compat import instantiate

_HELD = 16  # distinct settings kept
_cache: dict[str, Any] = {}


def tokenizer(cfg: dict[str, Any]) -> Any:
    """The tokenizer of a torchtune config."""
    return _once(cfg, lambda: instantiate(OmegaConf.create(cfg)))


def dataset(cfg: dict[str, Any], tokenizer_cfg: dict[str, Any]) -> Any:
    """A tokenised split: the `dataset` or `dataset_val` node of a torchtune config."""
    files = version(cfg["data_files"], cfg.get("format")) if "data_files" in cfg else []
    return _once([cfg, tokenizer_cfg, files], lambda: instantiate(OmegaConf.create(cfg), tokenizer(tokenizer_cfg)))


def skeleton(cfg: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model of a torchtune config without weights (on the meta device); only to be looked at."""
    return _once([cfg, str(dtype)], lambda: base_model.skeleton(cfg, dtype))


def _once(key: Any, make) -> Any:
    text = json.dumps(key, sort_keys=True)
    if text not in _cache:
        while len(_cache) >= _HELD:
            del _cache[next(iter(_cache))]
        _cache[text] = make()
    return _cache[text]
