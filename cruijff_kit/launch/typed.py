"""What to type for the same runs again: from what Hydra keeps of a command. Light."""

from collections.abc import Mapping
from typing import Any

# Where the runs lie, and what showed or planned them instead of making them.
_NOT_AGAIN = (
    "hydra.mode",
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.job.",
    "scaffold",
    "dry_run",
)


def typed_arguments(hydra: Mapping[str, Any]) -> list[str]:
    """The arguments of the command behind a configuration, without -m: the folder of YAML of the user's own, and overrides.

    Args:
        hydra: Hydra's own node, as a container.
    """
    sources = hydra["runtime"]["config_sources"]
    folders = [s["path"] for s in sources if s["provider"] == "command-line"]
    overrides = [*hydra["overrides"]["hydra"], *hydra["overrides"]["task"]]
    kept = [str(o) for o in overrides if not str(o).lstrip("+~").startswith(_NOT_AGAIN)]
    return [part for folder in folders for part in ("--config-dir", folder)] + kept
