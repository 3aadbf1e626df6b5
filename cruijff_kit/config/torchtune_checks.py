"""conf/torchtune.yaml against what it became: refuses a torchtune config that contradicts the typed settings.

The plan, a run's record and the tables are made from the typed settings, so the recipe must receive the same. Called by
config.load; no torch. (What a component takes is checked by training.components, with torch.)
"""

import json
from typing import Any

from cruijff_kit.config.keys import describe_unknown_key
from cruijff_kit.config.torchtune_template import filled_keys, torchtune_template
from cruijff_kit.util.errors import UserError

# What our recipes do not do, so that another value would have no effect.
_FIXED = {"save_adapter_weights_only": True, "checkpointer.recipe_checkpoint": None}
# What other optimizers and loggers do not take, so that it may be removed.
_OPTIONAL = ("optimizer.weight_decay", "metric_logger.log_dir", "metric_logger.append")
# Sections that may be set to differ: what is read, and where from.
_FREE = ("dataset", "dataset_val", "tokenizer", "checkpointer")
_ABSENT = object()


def check_torchtune(run: dict[str, Any]) -> None:
    """Refuse a torchtune config with other top-level keys than ours, or one that contradicts the typed settings.

    Args:
        run: the whole config of a run as a tree, resolved.
    Raises:
        UserError: names the key, and what to set instead.
    """
    template, tree = torchtune_template(), run["torchtune"]
    for key in tree:
        if key not in template:
            raise UserError(describe_unknown_key(f"torchtune.{key}"))
    for key, ours in template.items():
        if key not in tree or isinstance(ours, dict) is not isinstance(tree[key], dict):
            raise UserError(f"torchtune.{key} cannot be removed or replaced; set what is in it")
    for path, key in filled_keys():
        if path.partition(".")[0] in _FREE:
            continue
        value = _value(tree, path)
        if value is _ABSENT and path in _OPTIONAL:
            continue
        if value is _ABSENT:
            raise UserError(f"torchtune.{path} cannot be removed; it is filled from {key}")
        if value != _value(run, key):
            formatted = value if isinstance(value, str) else json.dumps(value)
            raise UserError(f"torchtune.{path} is filled from {key}; set {key}={formatted} instead")
    for path, fixed in _FIXED.items():
        if (value := _value(tree, path)) != fixed and value is not _ABSENT:
            raise UserError(f"torchtune.{path}={json.dumps(value)} has no effect here; leave it at {json.dumps(fixed)}")


def _value(tree: Any, path: str) -> Any:
    for name in path.split("."):
        tree = tree.get(name, _ABSENT) if isinstance(tree, dict) else _ABSENT
    return tree
