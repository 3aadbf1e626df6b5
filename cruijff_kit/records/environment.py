"""environment.json: the environment of a run. Python, packages, system, hardware, our code, the user's code, the model.

Nothing of the data, no environment variables. Beside it, in provenance/, what no commit holds: code.patch, the edits of our
checkout, and the Python files of the user's own that the run uses. Of red data neither (their hashes stay). Light.
"""

import functools
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cruijff_kit.data.tiers import RED
from cruijff_kit.records.own_code import describe_own_code, normalise_name
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.versions import CODE, PACKAGE, code_hash, git_commit
from cruijff_kit.util.files import write_text
from cruijff_kit.util.redaction import WITHHELD

if TYPE_CHECKING:
    from cruijff_kit.config.run import RunConfig
    from cruijff_kit.models.device import Machine

NAME, POSTHOC = "environment.json", "environment_evaluate.json"
FOLDER, PATCH = "provenance", "code.patch"
_MOST = 1 << 20  # bytes of a patch; a larger one is no edit


def write_environment(config: "RunConfig", machine: "Machine", name: str = NAME) -> None:
    """Write environment.json into a run's folder; one from before a restart that says something else gets a number.

    Args:
        config: of the run. machine: what it computes on. name: of the file.
    """
    from cruijff_kit.models.fingerprint import fingerprint, hash_files

    folder, red = RunFolder(config.output_dir), config.dataset.tier == RED
    environment = describe_environment(machine)
    environment["code"] = environment["code"] | _write_patch(folder.path, red)
    environment["own_code"] = describe_own_code(config, None if red else folder.path / FOLDER)
    path = config.model.path
    environment["model"] = {"path": path, "hash": fingerprint(path), "files": hash_files(path)}
    text = json.dumps(environment, indent=1, ensure_ascii=False) + "\n"
    existing_file = folder.path / name
    if existing_file.is_file() and existing_file.read_text(encoding="utf-8") != text:
        number = len([*folder.path.glob(f"{existing_file.stem}_*.json")]) + 1
        existing_file.rename(existing_file.with_name(f"{existing_file.stem}_{number}.json"))
    folder.write(name, text)


def read_environment(run: Path) -> dict[str, Any] | None:
    """Read environment.json; None if it is missing or cannot be read."""
    try:
        environment = json.loads((run / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return environment if isinstance(environment, dict) else None


def describe_environment(machine: "Machine") -> dict[str, Any]:
    """Describe Python, system, hardware, packages and our code; all but the GPU is looked up once per process."""
    from cruijff_kit.models.device import describe_hardware

    python = {"version": platform.python_version(), "implementation": platform.python_implementation()}
    return {
        "python": python,
        "system": describe_system(),
        **describe_hardware(machine),
        "packages": list_packages(),
        "code": {"version": list_packages().get("cruijff-kit"), "commit": git_commit(), "hash": code_hash()},
    }


@functools.cache
def list_packages() -> dict[str, str]:
    """Return normalised name (PEP 503) -> version of every installed package."""
    packages: dict[str, str] = {}
    for package in importlib.metadata.distributions():
        name = package.metadata["Name"]
        if name:  # a folder that a broken uninstall left has none
            packages.setdefault(normalise_name(name), package.version)
    return dict(sorted(packages.items()))


@functools.cache
def describe_system() -> dict[str, str | None]:
    """Describe the operating system: kernel, distribution, C library, and the machine's architecture."""
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME")
    except OSError:
        distribution = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else None
    libc = " ".join(platform.libc_ver()).strip() or None
    return {
        "name": platform.system(),
        "release": platform.release(),
        "distribution": distribution,
        "libc": libc,
        "architecture": platform.machine(),
    }


def _write_patch(run: Path, red: bool) -> dict[str, str | None]:
    """Write the edits of our checkout into a run's folder; returns what environment.json says of them."""
    edits = _diff_checkout()
    if not edits:
        return {"patch": None, "why_no_patch": None}
    if red:
        return {"patch": None, "why_no_patch": WITHHELD}
    if len(edits) > _MOST:
        return {"patch": None, "why_no_patch": f"{len(edits)} bytes, more than {_MOST}"}
    write_text(run / FOLDER / PATCH, edits.decode("utf-8", errors="replace"))
    return {"patch": f"{FOLDER}/{PATCH}", "why_no_patch": None}


@functools.cache
def _diff_checkout() -> bytes:
    """Return the diff from the commit to the present code, with new files, for `git apply`; empty without a checkout."""
    if not (git_commit() or "").endswith("+changes"):
        return b""

    def git(*arguments: str) -> bytes:
        return subprocess.run(["git", "-C", str(PACKAGE.parent), *arguments], capture_output=True).stdout

    edits = git("diff", "HEAD", "--no-color", "--no-ext-diff", "--", *CODE)
    new = git("ls-files", "--others", "--exclude-standard", "-z", "--", *CODE).decode().split("\0")
    files = (git("diff", "--no-color", "--no-ext-diff", "--no-index", "--", "/dev/null", file) for file in new if file)
    return b"".join([edits, *files])
