"""How sensitive a run's data is, and what follows: green (public), yellow (ask first), red (sensitive).

The strictest counts of `dataset.tier` and every file named TIER beside the data: in the folder that holds it and in every
folder above, by the path that was given and by the real one. A file has one word: green, yellow or red. Of data that is
drawn from a seed the setting alone counts.

yellow   a coding agent (agents.py) needs dataset.permission
red      samples, prompts and answers leave the process neither in messages (withheld.py) nor in logs
         (evaluation/log_redaction.py); folders are the owner's alone; nothing goes to a server
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cruijff_kit.data.dataset_files import locate
from cruijff_kit.util.errors import UserError

GREEN, YELLOW, RED = TIERS = ("green", "yellow", "red")
FILE = "TIER"
LONGEST_GROUP = 40  # letters; what is longer is a text, and no group


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
    given = [*path.values()] if isinstance(path, Mapping) else [str(path)]
    places = {os.path.expanduser(str(p)) for p in given}
    with contextlib.suppress(UserError, OSError, KeyError):  # what is wrong with the data is said when it is read
        places |= {str(f.path) for f in locate(path if isinstance(path, Mapping) else str(path), format).files}
    found = {file for place in places for file in _beside(place)}
    return {file for file in found if os.path.lexists(file) and not os.path.isdir(file)}


def _beside(place: str) -> Iterator[str]:
    # A folder on the way may itself be a link, so the real path is looked for from each of them.
    given = Path(os.path.abspath(place))
    for start in {given, *(Path(os.path.realpath(p)) for p in (Path(place), *given.parents))}:
        yield from (os.path.join(folder, FILE) for folder in (start, *start.parents))


def _word(file: str) -> str:
    try:
        word = Path(file).read_text(encoding="utf-8-sig").strip().lower()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{file} cannot be read; it must say {', '.join(TIERS[:2])} or {RED}, in one word") from None
    if word not in TIERS:
        raise UserError(f"{file} says none of {', '.join(TIERS)}; write one of them into it, and nothing else")
    return word


def write_tier(folder: Path, tier: str) -> Path:
    """Mark a folder of data."""
    path = folder / FILE
    path.write_text(tier + "\n", encoding="utf-8")
    return path
