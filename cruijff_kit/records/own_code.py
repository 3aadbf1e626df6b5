"""The user's own code that a run uses: files of tasks, modules of metrics and components, and what these import.

Found in the source, not by running it. Light.
"""

import ast
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cruijff_kit.util.redaction import WITHHELD

if TYPE_CHECKING:
    from cruijff_kit.config.run import RunConfig

_MOST, _MOST_TOGETHER = 1 << 20, 10 << 20  # bytes of a file, and of all of a run's, that are copied
_OURS = ("cruijff_kit", "torchtune", "torch")  # what components are made of where the user has none


def describe_own_code(config: "RunConfig", to: Path | None) -> dict[str, Any]:
    """The Python files of the user's own, copied unless a git repository holds them as they are.

    Args:
        config: of the run.
        to: the folder for the copies; None: none is made.
    Returns:
        files: path, sha256, commit (of the repository that holds it unchanged) or copy (below the run's folder) or
        why_no_copy. packages: installed ones that these files import.
    """
    files = find_own_files(config)
    root = Path(os.path.commonpath([f.parent for f in files])) if files else Path()
    described, copied = [], 0
    for file, commit in zip(files, _find_commits(tuple((f, f.stat().st_mtime_ns) for f in files)), strict=True):
        content = file.read_bytes()
        entry = {"path": str(file), "sha256": hashlib.sha256(content).hexdigest(), "commit": commit}
        entry |= {"copy": None, "why_no_copy": None}
        if commit is None and to is None:
            entry["why_no_copy"] = WITHHELD
        elif commit is None and (len(content) > _MOST or copied + len(content) > _MOST_TOGETHER):
            entry["why_no_copy"] = f"{len(content)} bytes are too many"
        elif commit is None and to is not None:
            place = to / file.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(content)
            entry["copy"], copied = place.relative_to(to.parent).as_posix(), copied + len(content)
        described.append(entry)
    return {"files": described, "packages": _find_packages(files)}


def find_own_files(config: "RunConfig") -> list[Path]:
    """Return the user's own Python files that a run uses, sorted."""
    waiting = [(name.file, name.file.parent) for name in config.eval.names if name.file is not None]
    dotted = [*config.custom_metrics, *_find_components(config.torchtune)]
    packages = [name.task.partition("/")[0] for name in config.eval.names if name.file is None and not name.ships]
    for module in [*dotted, *(m for package in packages for m in _find_task_modules(package))]:
        waiting += _find_files(module)
    files: set[Path] = set()
    while waiting:
        file, root = waiting.pop()
        file = Path(os.path.abspath(file))
        if file not in files and file.is_file():
            files.add(file)
            waiting += [(f, root) for name in _find_imports(file) for f in _resolve_import(name, file, root)]
    return sorted(files)


def _find_components(tree: Any) -> Iterator[str]:
    """Dotted names in a torchtune config that are neither ours nor torchtune's."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == "_component_" and isinstance(value, str) and value.partition(".")[0] not in _OURS:
                yield value
            else:
                yield from _find_components(value)


def _find_task_modules(package: str) -> list[str]:
    """Return the modules that an installed package's entry point names for inspect-ai."""
    points = importlib.metadata.entry_points(group="inspect_ai")
    return [point.module for point in points if point.name == package]


def _find_files(dotted: str) -> Iterator[tuple[Path, Path]]:
    """The files of a dotted name that are the user's, each with the folder that the name is looked up in."""
    top = dotted.partition(".")[0]
    if top in sys.stdlib_module_names or top in _list_installed():
        return
    try:
        spec = importlib.util.find_spec(top)
    except (ImportError, ValueError):  # __main__, of a notebook
        return
    if spec is None:
        return
    packages = [Path(p).parent for p in spec.submodule_search_locations or ()]
    for root in packages or [Path(spec.origin or top).parent]:
        yield from ((file, root) for file in _module_files(root, dotted))


def _find_imports(file: Path) -> Iterator[tuple[int, str]]:
    """Return the imports of a file: (leading dots, dotted name); `from a import b` gives a and a.b. Empty if invalid."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module or ""
            yield from ((node.level, f"{node.module or ''}.{alias.name}".lstrip(".")) for alias in node.names)


def _resolve_import(imported: tuple[int, str], file: Path, root: Path) -> Iterator[Path]:
    """The files that an import means, if they lie beside the file, below its root, or where the command was given."""
    dots, name = imported
    if name.partition(".")[0] in _OURS and not dots:
        return
    roots = [*file.parents][dots - 1 : dots] if dots else [file.parent, root, Path.cwd()]
    for place in dict.fromkeys(roots):
        yield from _module_files(place, name)
        if dots:
            yield place / "__init__.py"


def _module_files(root: Path, dotted: str) -> Iterator[Path]:
    """The modules and packages on the way of a dotted name."""
    place = root
    for part in filter(None, dotted.split(".")):
        place = place / part
        yield from (f for f in (place.with_suffix(".py"), place / "__init__.py") if f.is_file())


@functools.cache
def _find_commits(files: tuple[tuple[Path, int], ...]) -> list[str | None]:
    """Return for each file the commit of its repository if the commit holds the file unchanged, else None.

    Args:
        files: with their modification times, so that the cache is not used for an edited file.
    """
    commits: dict[Path, str] = {}
    for folder in {file.parent for file, _ in files}:
        names = [file.name for file, _ in files if file.parent == folder]
        commit = _git(folder, "rev-parse", "HEAD")
        command = ["status", "--porcelain", "-z", "--ignored", "--untracked-files=all", "--"]
        status = _git(folder, "--literal-pathspecs", *command, *names)
        if commit and status is not None:
            changed = {Path(entry[3:]).name for entry in status.split("\0")}
            commits |= {folder / name: commit.strip() for name in names if name not in changed}
    return [commits.get(file) for file, _ in files]


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        process = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True)
    except OSError:
        return None
    return process.stdout if process.returncode == 0 else None


def _find_packages(files: list[Path]) -> list[str]:
    """Installed packages that files import, by name."""
    if not files:
        return []
    tops = {name.partition(".")[0] for file in files for dots, name in _find_imports(file) if not dots}
    return sorted({normalise_name(package) for top in tops for package in _list_installed().get(top, ())})


@functools.cache
def _list_installed() -> dict[str, list[str]]:
    """Top-level module -> packages it belongs to, but for editable ones: whose code is somebody's who works on it."""
    edited = {d.metadata["Name"] for d in importlib.metadata.distributions() if _is_editable(d)}
    packages = importlib.metadata.packages_distributions()
    return {top: names for top, all_names in packages.items() if (names := sorted({*all_names} - edited))}


def normalise_name(package: str) -> str:
    """Return the normalised name of a package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", package).lower()


def _is_editable(package: importlib.metadata.Distribution) -> bool:
    try:
        return bool(json.loads(package.read_text("direct_url.json") or "{}").get("dir_info", {}).get("editable"))
    except (ValueError, AttributeError):
        return False
