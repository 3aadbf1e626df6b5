"""The versions of code and packages that a run uses."""

import contextlib
import functools
import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""The folder of the installed package."""

# What tables and the methods text name; environment.json has every package.
RECORDED_PACKAGES = (
    "cruijff_kit", "torch", "torchtune", "torchao", "hydra-core", "inspect-ai", "tokenizers",
    "numpy", "scipy", "scikit-learn", "statsmodels",
)  # fmt: skip


CODE = tuple(
    f"{folder}/*.{kind}" for folder in ("cruijff_kit", "recipes", "conf") for kind in ("py", "yaml", "html", "js")
) + ("pyproject.toml",)
"""Pathspecs (git) of the code in a checkout; they exclude data."""


@functools.cache
def _versions() -> dict[str, str]:
    installed = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[name] = importlib.metadata.version(name)
    return installed


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    return dict(_versions())


@functools.cache
def git_commit() -> str | None:
    """Return the commit of the checkout this package runs from, with "+changes" if its code was edited; None from a wheel.

    The first call counts for the whole process.
    """
    folder = PACKAGE
    if not (folder.parent / ".git").exists():
        return None
    try:
        git = ["git", "-C", str(folder)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        paths = [f":(top){path}" for path in CODE]
        command = [*git, "status", "--porcelain", "--untracked-files=all", "--", *paths]
        status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+changes" if status.strip() else "")


@functools.cache
def code_hash() -> str:
    """Return 16 hex digits over every Python file of the package, as it was at the first call."""
    digest = hashlib.sha256()
    folders = [PACKAGE, PACKAGE / "recipes", PACKAGE.parent / "recipes"]  # the last in a checkout
    files = {f for folder in folders if folder.is_dir() for f in folder.rglob("*.py")}
    for file in sorted(files):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]
