"""The sweeper that makes values into runs (-m). Installed as hydra_plugins.cruijff_kit_launcher.sweeper."""

from collections.abc import Sequence
from typing import Any

from hydra.core.override_parser.types import Override
from hydra_plugins.cruijff_kit_launcher.launcher import SweepLauncher
from omegaconf import OmegaConf

from cruijff_kit.config.hydra_private import basic_sweeper
from cruijff_kit.sweep.expand import as_params, expand


class Sweeper(basic_sweeper.BasicSweeper):
    """Hydra's basic sweeper with values in pairs and runs one by one, and without composing every run once before our
    launcher does it.
    """

    def __init__(self, max_batch_size: int | None, params: Any = None, paired: Any = None, runs: Any = None) -> None:
        plain = OmegaConf.to_container(OmegaConf.create({"params": params or {}, "paired": paired, "runs": runs}))
        super().__init__(max_batch_size, plain["params"])
        self.paired, self.runs = plain["paired"], plain["runs"]

    def _parse_config(self) -> list[str]:
        return as_params(self.params)

    def split_arguments(  # type: ignore[override]  # a static method there
        self, overrides: list[Override], max_batch_size: int | None
    ) -> list[list[list[str]]]:
        """All runs, in batches; what comes from `params` stands before what was typed."""
        num_params = len(self.params)
        runs = expand(overrides[:num_params], overrides[num_params:], self.paired, self.runs)
        return list(self.split_overrides_to_chunks(runs, max_batch_size))

    def validate_batch_is_legal(self, batch: Sequence[Sequence[str]]) -> None:
        """Leave it to our launcher, which refuses a bad run before it starts any."""
        if not isinstance(self.launcher, SweepLauncher):
            super().validate_batch_is_legal(batch)
