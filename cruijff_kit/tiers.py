"""How sensitive a run's data is, and what follows: green (public), yellow (ask first), red (sensitive).

The strictest counts of `dataset.tier` and every file named TIER beside the data: in the folder that holds it and in every
folder above, by the path that was given and by the real one. A file has one word: green, yellow or red. Of data that is
drawn from a seed the setting alone counts.

yellow   a coding agent (agents.py) needs dataset.permission
red      samples, prompts and answers leave the process neither in messages (withheld.py) nor in logs
         (evaluation/redaction.py); folders are the owner's alone; nothing goes to a server
"""

import contextlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cruijff_kit import withheld
from cruijff_kit.agents import agent
from cruijff_kit.errors import UserError
from cruijff_kit.withheld import quoted

if TYPE_CHECKING:
    from cruijff_kit.config import RunConfig
    from cruijff_kit.result import RunResult

__all__ = [
    "FILE", "GREEN", "RED", "TIERS", "YELLOW", "admit", "admit_agent", "close_folder", "handle", "marked", "note", "notice",
    "quoted", "refuse_servers", "submitted", "tier_of", "withholds", "withholds_samples", "write_tier",
]  # fmt: skip

GREEN, YELLOW, RED = TIERS = ("green", "yellow", "red")
FILE = "TIER"
LONGEST_GROUP = 40  # letters; what is longer is a text, and no group
_LOCAL_STORES = ("", "file", "sqlite")
_submitted = False
_chosen: bool | None = None  # whether an agent gives the command that this process is, where that was said


def strictest(tiers: Iterable[str]) -> str:
    """The strictest of some tiers; green of none."""
    return max(tiers, key=TIERS.index, default=GREEN)


def marked(path: str | Path | Mapping[str, str], format: str | None = None) -> str:
    """The strictest tier that files named TIER beside some data ask for.

    Args:
        path: as dataset.path: a file, a folder, or {split: file}; it need not exist.
        format: as dataset.format.
    Raises:
        UserError: such a file says something else.
    """
    return strictest(_word(file) for file in _files(path, format))


def _files(path: str | Path | Mapping[str, str], format: str | None) -> set[str]:
    from cruijff_kit.data.layouts import locate

    given = [*path.values()] if isinstance(path, Mapping) else [str(path)]
    places = {os.path.expanduser(str(p)) for p in given}
    with contextlib.suppress(UserError, OSError, KeyError):  # what is wrong with the data is said when it is read
        places |= {str(f.path) for f in locate(path if isinstance(path, Mapping) else str(path), format).files}
    found = {file for place in places for file in _beside(place)}
    return {file for file in found if os.path.lexists(file) and not os.path.isdir(file)}


def _beside(place: str) -> Iterator[str]:
    # A folder on the way may itself be a link, so the real path is looked for from each of them.
    given = Path(os.path.abspath(place))
    for start in {given, *(Path(os.path.realpath(p)) for p in (place, *given.parents))}:
        yield from (os.path.join(folder, FILE) for folder in (start, *start.parents))


def _word(file: str) -> str:
    try:
        word = Path(file).read_text(encoding="utf-8-sig").strip().lower()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{file} cannot be read; it must say {', '.join(TIERS[:2])} or {RED}, in one word") from None
    if word not in TIERS:
        raise UserError(f"{file} says none of {', '.join(TIERS)}; write one of them into it, and nothing else")
    return word


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
        withheld.begin()


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
    from urllib.parse import urlsplit

    host = urlsplit(uri).netloc
    return "" if host == "localhost" else host


def withholds_samples(config: "RunConfig") -> bool:
    """Whether the logs of a run's evaluations go without their samples."""
    return config.dataset.tier == RED and not config.eval.keep_samples


def close_folder(folder: str | Path, experiment: str | None = None) -> None:
    """Make a folder of red data the owner's alone, and the folder of its sweep (or of its time) too.

    Args:
        experiment: of the run whose folder it is; None: the folder alone.
    """
    folder = Path(folder).absolute()
    above = folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    for place, _, files in os.walk(folder):
        _close(place, *(os.path.join(place, file) for file in files))
    if experiment is not None and ((above / "sweep.json").exists() or above.parent.name == experiment):
        _close(above, *(file for file in above.iterdir() if file.is_file()))


def _close(*places: str | Path) -> None:
    for place in places:
        with contextlib.suppress(FileNotFoundError):  # somebody's draft, which has its name by now
            mode = stat.S_IMODE(os.lstat(place).st_mode)
            if mode & 0o077 and not os.path.islink(place):
                os.chmod(place, mode & 0o700)


def write_tier(folder: Path, tier: str) -> Path:
    """Mark a folder of data."""
    path = folder / FILE
    path.write_text(tier + "\n", encoding="utf-8")
    return path


def withholds(result: "RunResult") -> bool:
    """Whether reports must not show the samples of a run: its data is red, or has been marked so since."""
    if getattr(result, "tier", GREEN) == RED:
        return True
    data = getattr(result, "paths", {}).get("data")
    try:
        red = data is not None and marked(data) == RED
    except UserError:  # a TIER file that says something else
        red = True
    if red:
        handle(RED)
    return red


def notice(results: Iterable["RunResult"]) -> str:
    """A line for tables and summaries about red data among the results; empty where there is none."""
    red = [r for r in results if withholds(r)]
    if not red:
        return ""
    if all(getattr(r, "redacted", True) for r in red):
        return "red data: samples are withheld in logs and reports"
    return "red data: samples are withheld in reports, but some logs hold them (eval.keep_samples)"
