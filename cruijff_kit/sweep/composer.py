"""Composing many runs that differ in values only: Hydra composes once per choice of groups, values are set on copies.

The result is what Hydra's own load_sweep_config gives (tests/sweep/test_composer.py), in a fraction of the time.
"""

import pickle
from collections.abc import Sequence

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cruijff_kit.config.hydra_private import set_values
from cruijff_kit.config.overrides import parse_overrides


class Composer:
    """Composes the runs of one sweep."""

    def __init__(self, loader: ConfigLoader, master: DictConfig) -> None:
        """Args: loader, master: Hydra's config loader, and the sweep's own config."""
        self._loader, self._master = loader, master
        self._bases: dict[tuple[str, ...], bytes] = {}  # pickled: loading is the fastest way to copy
        self._is_group: dict[str, bool] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """Compose the config of a run, with the ``hydra`` node.

        Raises:
            ConfigCompositionException: what Hydra would raise.
        """
        parsed = parse_overrides(overrides)
        structural = tuple(o.input_line for o in parsed if self._is_structural(o))
        if structural not in self._bases:
            self._bases[structural] = pickle.dumps(self._loader.load_sweep_config(self._master, list(structural)))
        config = pickle.loads(self._bases[structural])
        try:
            set_values(config, [o for o in parsed if not self._is_structural(o)])
        except OmegaConfBaseException:
            return self._loader.load_sweep_config(self._master, list(overrides))  # says it in Hydra's words
        task = [o for o in parsed if not o.is_hydra_override()]
        config.hydra.overrides.task = [o.input_line for o in task]
        if not OmegaConf.is_interpolation(config.hydra.job, "override_dirname"):  # which it is from Hydra 1.4 on
            config.hydra.job.override_dirname = _override_dirname(task, config.hydra.job.config.override_dirname)
        OmegaConf.copy_cache(from_config=self._master, to_config=config)
        return config

    def _is_structural(self, override: Override) -> bool:
        """Return whether Hydra must compose again: the override chooses an option of a group or sets a key of Hydra."""
        if override.package is not None or override.is_hydra_override():
            return True
        key = override.key_or_group
        if key not in self._is_group:
            hydra = self._master.hydra
            # hydra.searchpath=[...] may bring groups of the user's; what is interpolated is not resolved yet.
            search = OmegaConf.to_container(hydra.overrides.hydra)
            options = self._loader.get_group_options(key, config_name=hydra.job.config_name, overrides=search)
            self._is_group[key] = bool(options)
        return self._is_group[key]


def _override_dirname(task: Sequence[Override], named: DictConfig) -> str:
    """`hydra.job.override_dirname` as Hydra 1.3 fills it."""
    lines = sorted(o.input_line for o in task if o.key_or_group not in named.exclude_keys)
    return named.item_sep.join(lines).replace("=", named.kv_sep)
