"""What the tier of a run's data forbids and demands."""

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cruijff_kit.util import redaction
from cruijff_kit.util.agents import agent
from cruijff_kit.util.errors import UserError

if TYPE_CHECKING:
    from cruijff_kit.config.run import RunConfig
from cruijff_kit.data.tiers import RED, YELLOW, marked, strictest

_LOCAL_STORES = ("", "file", "sqlite")


_submitted = False


_chosen: bool | None = None  # whether an agent gives the command that this process is, where that was said


def tier_of(config: "RunConfig") -> str:
    """The tier that counts for a run. Raises UserError as `marked`."""
    data = config.dataset
    files = [str(n.file) for n in config.eval.names if n.file is not None]  # a task's samples lie where it does
    beside = [marked(f) for f in files] + ([marked(data.path, data.format)] if data.generator is None else [])
    return strictest([data.tier, *beside])


def note(config: "RunConfig") -> str:
    """Find a run's tier, write it into its config, where it stays, and behave accordingly; called as soon as it is known.

    Raises:
        UserError: as `marked`.
    """
    config.dataset.tier = tier_of(config)
    handle(config.dataset.tier)
    return config.dataset.tier


def handle(tier: str) -> None:
    """Behave as this tier demands, from now on."""
    if tier == RED:
        redaction.begin()


def submitted() -> None:
    """This process is a job of a cluster: whether an agent may give the command was settled when it was submitted."""
    global _submitted
    _submitted = True


def admit(config: "RunConfig") -> str:
    """Refuse what a run's tier forbids, before anything of its data is read; the tier.

    Raises:
        UserError: a coding agent without permission, red data on its way to a server, or a wrong TIER file.
    """
    tier = note(config)
    known_by = admit_agent(tier, config.dataset.permission, config.agent)
    if tier == RED:
        if known_by and config.eval.keep_samples:
            raise UserError(
                f"eval.keep_samples=true would leave red data in logs, and a coding agent gives the command ({known_by}); "
                "leave it out, or let a person give the command"
            )
        refuse_servers()
    return tier


def admit_agent(
    tier: str, permission: str | None, chosen: bool | None, setting: str = "dataset.permission=", dash: str = "'{}'"
) -> str | None:
    """Refuse a coding agent that has no permission for yellow data; by what the agent is known, None for a person.

    Raises:
        UserError: names the setting.
    """
    global _chosen
    _chosen = _chosen if chosen is None else chosen  # what a run's folder holds does not say it
    known_by = None if _submitted else agent(_chosen)
    if tier == YELLOW and known_by and not (permission or "").strip():
        typed = dash.format(f'{setting}"who allowed it, when"')
        raise UserError(
            f"the data is yellow, and a coding agent gives the command ({known_by}), which needs a person's permission; "
            f"ask, then add {typed}"
        )
    return known_by


def refuse_servers() -> None:
    """Refuse environment variables that would send red data away. Raises UserError, which names the first."""
    wandb = os.environ.get("WANDB_MODE", "offline").strip().lower()
    if wandb not in ("", "offline", "dryrun", "disabled"):
        raise UserError(f"the data is red, and WANDB_MODE={wandb} sends runs to a server; set WANDB_MODE=offline")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "INSPECT_LOG_DIR"):
        value = os.environ.get(name, "").strip()
        scheme = value.partition(":")[0].lower() if ":" in value else ""
        remote = scheme not in _LOCAL_STORES or value.lower() in ("databricks", "databricks-uc", "uc")
        if remote or value.startswith("//") or value.lower().startswith("file://") and _host_of(value):
            raise UserError(
                f"the data is red, and {name} names a server ({scheme or value}); take it out: unset {name}"
            )
    if os.environ.get("INSPECT_TELEMETRY"):
        raise UserError("the data is red, and INSPECT_TELEMETRY sends samples elsewhere; unset INSPECT_TELEMETRY")


def _host_of(uri: str) -> str:
    host = urlsplit(uri).netloc
    return "" if host == "localhost" else host


def withholds_samples(config: "RunConfig") -> bool:
    """Whether the logs of a run's evaluations go without their samples."""
    return config.dataset.tier == RED and not config.eval.keep_samples
