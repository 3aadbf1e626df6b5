"""The private names of Hydra that we use; no other module imports one.

hydra-core 1.3.8 and 1.4 have them. tests/architecture/test_private_names.py says which one a release renames.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins import basic_sweeper
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from hydra.core.utils import JobReturn
from omegaconf import DictConfig

# The module, not the class: the search for plugins runs the module again, and a class taken before is stale.
__all__ = ["basic_sweeper"]

BASIC_SWEEPER = f"{basic_sweeper.BasicSweeper.__module__}.{basic_sweeper.BasicSweeper.__qualname__}"
"""`hydra.sweeper._target_` of hydra/sweeper=basic."""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of Hydra's own flags."""
    return get_args_parser()


def write_value(value: Any) -> str:
    """Write a value in Hydra's grammar, for behind the ``=`` of an override."""
    return Override._get_value_element_as_str(value)


def set_values(config: DictConfig, overrides: Sequence[Override]) -> None:
    """Set the values of overrides that choose no group, in a composed config.

    Raises:
        OmegaConfBaseException: an unknown key, or a value of the wrong type.
    """
    ConfigLoaderImpl._apply_overrides_to_config(list(overrides), config)


def failure_of(job: JobReturn) -> Exception:
    """Return the exception of a failed job; its public ``return_value`` would raise it."""
    error: Exception = job._return_value
    return error
