"""What a run is: one dataclass per config group, each field with its type, default and meaning.

The YAML in conf/ makes the choices; this package says what may be chosen. `load` turns what Hydra composed into a
`RunConfig`, refusing anything that is not described here. Imported at start-up: no torch, no torchtune.
"""

from cruijff_kit.config.experiment import ExperimentConfig
from cruijff_kit.config.groups import DatasetConfig, EvalConfig, LoraConfig, ModelConfig, ResourcesConfig
from cruijff_kit.config.identity import config_hash, configuration_hash
from cruijff_kit.config.loading import literal, load, register
from cruijff_kit.config.run import AUTO, LR_SCHEDULERS, RunConfig
from cruijff_kit.config.slurm import SlurmConfig

__all__ = [
    "AUTO",
    "LR_SCHEDULERS",
    "DatasetConfig",
    "EvalConfig",
    "ExperimentConfig",
    "LoraConfig",
    "ModelConfig",
    "ResourcesConfig",
    "RunConfig",
    "SlurmConfig",
    "config_hash",
    "configuration_hash",
    "literal",
    "load",
    "register",
]
