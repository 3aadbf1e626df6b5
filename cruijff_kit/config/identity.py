"""What makes two runs the same run."""

import dataclasses
import hashlib
import json
from typing import Any

from cruijff_kit.config.run import RunConfig

# Where a run is made, what it is called and who is told.
_NOT_COMPUTED = (
    "output_dir",
    "run_name",
    "experiment",
    "objective",
    "dry_run",
    "multi_lora",
    "report",
    "scaffold",
    "max_gpu_hours",
    "approved",
    "force",
    "slurm",
    "models_dir",
    "trackers",
    "agent",
)
# Who may see the data, not what is computed from it.
_OF_THE_TIER = {"dataset": ("tier", "permission", "group_columns"), "eval": ("keep_samples",)}


def config_hash(config: RunConfig) -> str:
    """Identity of what a run computes: 16 hex digits; where it runs and what it is called do not count."""
    return _hash(_computed(config), config.output_dir)


def configuration_hash(config: RunConfig) -> str:
    """As `config_hash`, the seed left aside: the same for all runs of one configuration."""
    tree = _computed(config)
    del tree["seed"], tree["torchtune"]["seed"]
    return _hash(tree, config.output_dir)


def _computed(config: RunConfig) -> dict[str, Any]:
    tree = dataclasses.asdict(config)
    for name in _NOT_COMPUTED:
        del tree[name]
    for group, names in _OF_THE_TIER.items():
        for name in names:
            del tree[group][name]
    del tree["model"]["resources"], tree["model"]["date"], tree["dataset"]["allow_leaks"]
    tree["torchtune"]["tokenizer"].pop("date", None)
    for name in ("checkpoint_every_n_steps", "resume_from_checkpoint"):  # an interrupted run ends as one that was not
        del tree[name], tree["torchtune"][name]
    tree["torchtune"]["metric_logger"].pop("append", None)
    del tree["torchtune"]["trackers"]
    # A task that was edited is another one.
    files = [name.file for name in config.eval.names if name.file is not None and name.file.is_file()]
    tree["eval"]["files"] = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    return tree


def _hash(tree: dict[str, Any], output_dir: str) -> str:
    text = json.dumps(tree, sort_keys=True, default=str).replace(output_dir, "<output_dir>")
    return hashlib.sha256(text.encode()).hexdigest()[:16]
