"""Files and folders: writing whole or not at all, closing to others, hashing."""

import contextlib
import difflib
import hashlib
import os
import stat
from pathlib import Path

from cruijff_kit.util.errors import UserError


def require_folder(folder: Path) -> None:
    """Raises UserError, naming the one that may have been meant, if a folder does not exist."""
    if folder.is_dir():
        return
    beside = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, beside, n=1, cutoff=0.8)
    raise UserError(
        f"no such folder: {folder}" + (f"; did you mean {folder.parent / near[0]}?" if near else ""),
        fix=None if near else "give the folder of a run or a sweep (multirun/EXPERIMENT/TIME), or one above them",
    )


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file whole or not at all, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
    return path


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


def sha256_of(file: Path) -> str:
    """Hash of a file's bytes."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
