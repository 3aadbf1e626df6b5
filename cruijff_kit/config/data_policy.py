"""Enforce the rules for the tier of a run's data (data/tiers.py defines the tiers)."""

import os
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cruijff_kit.data.tiers import RED, YELLOW, find_tier, strictest_tier
from cruijff_kit.util import redaction
from cruijff_kit.util.agents import detect_agent
from cruijff_kit.util.errors import UserError

if TYPE_CHECKING:
    from cruijff_kit.config.run import RunConfig

_LOCAL_STORES = ("", "file", "sqlite")


def tier_of(config: "RunConfig") -> str:
    """Return the strictest tier among a run's settings and the TIER files beside its data.

    Raises:
        UserError: as `find_tier`.
    """
    data = config.dataset
    files = [str(n.file) for n in config.eval.names if n.file is not None]  # a task's samples lie where it does
    beside = [find_tier(f) for f in files] + ([find_tier(data.path, data.format)] if data.generator is None else [])
    return strictest_tier([data.tier, *beside])


def raise_tier(config: "RunConfig") -> str:
    """Set dataset.tier to the strictest that counts, and redact from now on if it is red; returns the tier.

    Call it as soon as there is a config, before anybody can read a row.

    Raises:
        UserError: as `find_tier`.
    """
    config.dataset.tier = tier_of(config)
    enable_redaction_for(config.dataset.tier)
    return config.dataset.tier


def enable_redaction_for(tier: str) -> None:
    """Redact what this process prints and logs, from now on, if the tier is red."""
    if tier == RED:
        redaction.enable()


def check_access(config: "RunConfig") -> str:
    """Refuse what a run's tier forbids, before anything of its data is read; returns the tier.

    `config.agent` says who gives the command. A job of a cluster sets it to False: whether an agent may give the command
    was settled when the job was submitted.

    Raises:
        UserError: a coding agent without permission, red data on its way to a server, or a wrong TIER file.
    """
    tier = raise_tier(config)
    agent_name = check_agent(tier, config.dataset.permission, config.agent)
    if tier == RED:
        if agent_name and config.eval.keep_samples:
            raise UserError(
                f"eval.keep_samples=true would leave red data in logs, and a coding agent gives the command "
                f"({agent_name}); leave it out, or let a person give the command"
            )
        refuse_servers()
    return tier


def check_agent(
    tier: str,
    permission: str | None,
    is_agent: bool | None,
    setting: str = "dataset.permission=",
    quotes: str = "'{}'",
) -> str | None:
    """Refuse a coding agent that has no permission for yellow data.

    Args:
        is_agent: the setting `agent`; None: look at the environment.
        setting, quotes: how the message spells a permission.
    Returns:
        How the agent was recognised; None for a person.
    Raises:
        UserError: names the setting.
    """
    agent_name = detect_agent(is_agent)
    if tier == YELLOW and agent_name and not (permission or "").strip():
        typed = quotes.format(f'{setting}"who allowed it, when"')
        raise UserError(
            f"the data is yellow, and a coding agent gives the command ({agent_name}), which needs a person's permission; "
            f"ask, then add {typed}"
        )
    return agent_name


def refuse_servers() -> None:
    """Refuse environment variables that would send red data to a server. Raises UserError, which names the first."""
    wandb = os.environ.get("WANDB_MODE", "offline").strip().lower()
    if wandb not in ("", "offline", "dryrun", "disabled"):
        raise UserError(f"the data is red, and WANDB_MODE={wandb} sends runs to a server; set WANDB_MODE=offline")
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "INSPECT_LOG_DIR"):
        value = os.environ.get(name, "").strip()
        scheme = value.partition(":")[0].lower() if ":" in value else ""
        remote = scheme not in _LOCAL_STORES or value.lower() in ("databricks", "databricks-uc", "uc")
        if remote or value.startswith("//") or value.lower().startswith("file://") and _host_of(value):
            raise UserError(f"the data is red, and {name} names a server ({scheme or value}); remove it: unset {name}")
    if os.environ.get("INSPECT_TELEMETRY"):
        raise UserError("the data is red, and INSPECT_TELEMETRY sends samples elsewhere; unset INSPECT_TELEMETRY")


def _host_of(uri: str) -> str:
    host = urlsplit(uri).netloc
    return "" if host == "localhost" else host


def withholds_samples(config: "RunConfig") -> bool:
    """Return whether the logs of a run's evaluations omit their samples."""
    return config.dataset.tier == RED and not config.eval.keep_samples
