"""Write files and folders whole or not at all, make them private, hash them."""

import contextlib
import difflib
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from cruijff_kit.util.errors import UserError


def require_folder(folder: Path) -> None:
    """Raise UserError if a folder does not exist; the error names the folder that may have been meant."""
    if folder.is_dir():
        return
    siblings = [p.name for p in folder.parent.iterdir() if p.is_dir()] if folder.parent.is_dir() else []
    near = difflib.get_close_matches(folder.name, siblings, n=1, cutoff=0.8)
    raise UserError(
        f"no such folder: {folder}" + (f"; did you mean {folder.parent / near[0]}?" if near else ""),
        fix=None if near else "give the folder of a run or a sweep (multirun/EXPERIMENT/TIME), or one above them",
    )


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """Yield a draft beside `path` that becomes `path` when the block ends, and is removed when it raises.

    The block makes the draft: a file, which replaces an older one, or a folder, which replaces an empty one. A reader sees
    the old content or the new, never a part of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    _remove(draft)  # of a process with the same id that was killed
    try:
        yield draft
        os.replace(draft, path)
    finally:
        _remove(draft)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Write a UTF-8 file whole or not at all, making its folder."""
    with atomic(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def make_private(folder: str | Path, experiment: str | None = None) -> None:
    """Let only the owner open a folder of red data, and the folder of its sweep (or of its time).

    Args:
        experiment: of the run whose folder it is; None: the folder alone.
    """
    folder = Path(folder).absolute()
    parent = folder.parent
    folder.mkdir(parents=True, exist_ok=True)
    for root, _, files in os.walk(folder):
        _chmod_private(root, *(os.path.join(root, file) for file in files))
    if experiment is not None and ((parent / "sweep.json").exists() or parent.parent.name == experiment):
        _chmod_private(parent, *(file for file in parent.iterdir() if file.is_file()))


def _chmod_private(*paths: str | Path) -> None:
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # a draft of another process, which was renamed meanwhile
            mode = stat.S_IMODE(os.lstat(path).st_mode)
            if mode & 0o077 and not os.path.islink(path):
                os.chmod(path, mode & 0o700)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
