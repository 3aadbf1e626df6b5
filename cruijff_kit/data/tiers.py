"""Tiers of sensitivity: green (public), yellow (ask first), red (sensitive), and the TIER files that set them.

The strictest of `dataset.tier` and every file named TIER beside the data counts: in the folder that holds it and in every
folder above, by the given path and by the real one. A file has one word: green, yellow or red. For data that is
generated from a seed only the setting counts.

yellow   a coding agent (util/agents.py) needs dataset.permission
red      samples, prompts and answers leave the process neither in messages (util/redaction.py) nor in logs
         (evaluation/log_redaction.py); only the owner can open the folders; nothing is sent to a server
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cruijff_kit.data.dataset_files import find_files
from cruijff_kit.util.errors import UserError

GREEN, YELLOW, RED = TIERS = ("green", "yellow", "red")
TIER_FILE = "TIER"
MAX_GROUP_LENGTH = 40  # letters; a longer value is a text, not a group


def strictest_tier(tiers: Iterable[str]) -> str:
    """Return the strictest of some tiers; green if there are none."""
    return max(tiers, key=TIERS.index, default=GREEN)


def find_tier(path: str | Path | Mapping[str, str], format: str | None = None) -> str:
    """Return the strictest tier of the TIER files beside some data.

    Args:
        path: as dataset.path: a file, a folder, or {split: file}; it need not exist.
        format: as dataset.format.
    Raises:
        UserError: a TIER file does not hold a tier.
    """
    return strictest_tier(_read_tier(file) for file in _find_tier_files(path, format))


def _find_tier_files(path: str | Path | Mapping[str, str], format: str | None) -> set[str]:
    locations = [*path.values()] if isinstance(path, Mapping) else [str(path)]
    paths = {os.path.expanduser(str(p)) for p in locations}
    with contextlib.suppress(UserError, OSError, KeyError):  # reading the data reports what is wrong with it
        paths |= {str(f.path) for f in find_files(path if isinstance(path, Mapping) else str(path), format).files}
    candidates = {file for each in paths for file in _candidate_files(each)}
    return {file for file in candidates if os.path.lexists(file) and not os.path.isdir(file)}


def _candidate_files(path: str) -> Iterator[str]:
    # A parent folder may itself be a link, so the real path of each counts.
    absolute_path = Path(os.path.abspath(path))
    for start in {absolute_path, *(Path(os.path.realpath(p)) for p in (Path(path), *absolute_path.parents))}:
        yield from (os.path.join(folder, TIER_FILE) for folder in (start, *start.parents))


def _read_tier(file: str) -> str:
    try:
        word = Path(file).read_text(encoding="utf-8-sig").strip().lower()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{file} cannot be read; it must say {', '.join(TIERS[:2])} or {RED}, in one word") from None
    if word not in TIERS:
        raise UserError(f"{file} says none of {', '.join(TIERS)}; write one of them into it, and nothing else")
    return word


def write_tier(folder: Path, tier: str) -> Path:
    """Write a TIER file into a folder of data."""
    path = folder / TIER_FILE
    path.write_text(tier + "\n", encoding="utf-8")
    return path
