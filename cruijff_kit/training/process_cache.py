"""Cache the tokenizer, the tokenised splits and the model on the meta device, which runs of one process share.

`models.base_model` caches the base model's weights.
"""

import json
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import OmegaConf

from cruijff_kit.data.dataset_files import file_stamps
from cruijff_kit.models import base_model
from cruijff_kit.models.compat import instantiate

_MAX_ENTRIES = 16
_cache: dict[str, Any] = {}


def get_tokenizer(cfg: dict[str, Any]) -> Any:
    """Return the tokenizer of a torchtune config."""
    return _get(cfg, lambda: instantiate(OmegaConf.create(cfg)))


def get_dataset(cfg: dict[str, Any], tokenizer_cfg: dict[str, Any]) -> Any:
    """Return a tokenised split: the `dataset` or `dataset_val` node of a torchtune config."""
    files = file_stamps(cfg["data_files"], cfg.get("format")) if "data_files" in cfg else []
    return _get([cfg, tokenizer_cfg, files], lambda: instantiate(OmegaConf.create(cfg), get_tokenizer(tokenizer_cfg)))


def get_meta_model(cfg: dict[str, Any], dtype: torch.dtype) -> Any:
    """Return the model of a torchtune config without weights (on the meta device). Callers must not change it."""
    return _get([cfg, str(dtype)], lambda: base_model.build_on_meta(cfg, dtype))


def _get(settings: Any, make: Callable[[], Any]) -> Any:
    text = json.dumps(settings, sort_keys=True)
    if text not in _cache:
        while len(_cache) >= _MAX_ENTRIES:
            del _cache[next(iter(_cache))]
        _cache[text] = make()
    return _cache[text]
