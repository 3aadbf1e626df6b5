"""Compare the provenance of a run with the present: code, packages, data, base model, tasks, machine.

A difference matters if it can change a number: it computes, samples, or decides what the model reads.
"""

import platform
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from cruijff_kit.config.identity import config_hash
from cruijff_kit.config.run import RunConfig
from cruijff_kit.data.dataset_files import hash_data
from cruijff_kit.data.generators import generate
from cruijff_kit.evaluation.evaluation_grid import item_key
from cruijff_kit.models.download import download_command
from cruijff_kit.models.fingerprint import fingerprint
from cruijff_kit.records.archive_manifest import find_archived_data
from cruijff_kit.records.environment import describe_system, list_packages, read_environment
from cruijff_kit.records.own_code import normalise_name
from cruijff_kit.records.result import RunResult
from cruijff_kit.records.saved_config import load_saved_config
from cruijff_kit.records.sweep_manifest import SweepManifest, read_sweep_manifest
from cruijff_kit.records.versions import code_hash, git_commit
from cruijff_kit.slurm.run_states import find_origin, find_runs
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import hash_file

SAME, DIFFERS, MISSING, UNKNOWN = "the same", "differs", "missing", "unknown"
_COMPUTING = {
    "cruijff-kit", "torch", "torchtune", "torchao", "torchdata", "triton", "numpy", "scipy", "scikit-learn", "statsmodels",
    "pandas", "pyarrow", "safetensors", "tokenizers", "jinja2", "inspect-ai", "hydra-core", "omegaconf",
}  # fmt: skip
_COMPUTING_FAMILIES = ("nvidia-", "cuda-", "intel-", "mkl", "pytorch-")
_SHOWN = 5  # packages that are named, of those that compute nothing


@dataclass
class Dependency:
    """One thing that a run depends on, then and now."""

    what: str
    then: str
    now: str
    state: str
    fix: str | None = None
    """Action that is needed before the run can be reproduced; None if none is."""
    matters: bool = True
    """Whether a difference can change numbers."""


@dataclass
class Provenance:
    """All dependencies of a run, and what a reproduction must change."""

    rows: list[Dependency] = field(default_factory=list)
    changed: dict[str, Any] = field(default_factory=dict)
    """Settings as they were resolved then."""
    places: dict[str, str] = field(default_factory=dict)
    """Path then -> path now."""

    def add(
        self, what: str, then: Any, now: Any, state: str | None = None, fix: str | None = None, matters: bool = True
    ) -> None:
        """Add a dependency; its state follows from then and now unless it is given."""
        state = state or (UNKNOWN if then is None or now is None else SAME if then == now else DIFFERS)
        then, now = ("not recorded" if v is None else str(v) for v in (then, now))
        self.rows.append(Dependency(what, then, now, state, fix if state != SAME else None, matters))

    @property
    def refusals(self) -> list[Dependency]:
        """Dependencies that prevent a reproduction."""
        return [r for r in self.rows if r.fix is not None]


def collect_provenance(run: Path, result: RunResult) -> Provenance:
    """Compare what a run recorded with what is here. Data that is drawn from a seed is drawn if it is not there.

    Raises:
        UserError: the run's config cannot be read.
    """
    config, provenance = load_saved_config(run), Provenance()
    manifest = _find_sweep_manifest(run)
    then = read_environment(run) or {}
    _compare_code(provenance, result, manifest)
    _compare_own_code(provenance, then)
    _compare_packages(provenance, result, then)
    _compare_system(provenance, result, then)
    provenance.add("configuration", result.config_hash, config_hash(config))
    began = find_original_cwd(run, manifest)
    _compare_data(provenance, run, result, config, began)
    _compare_model(provenance, result, config, began)
    _compare_tasks(provenance, result, config)
    _compare_machine(provenance, result, config, then)
    if result.changes:
        changes = ", ".join(f"{k}={v}" for k, v in result.changes.items())
        provenance.add("changed by retries", changes, "as configured", DIFFERS)
    return provenance


def _find_sweep_manifest(run: Path) -> SweepManifest | None:
    ref = next((ref for ref in find_runs(run) if ref.folder == run.absolute()), None)
    sweep_dir = find_origin(ref).sweep_dir if ref else None
    return read_sweep_manifest(sweep_dir) if sweep_dir else None


def find_original_cwd(run: Path, manifest: SweepManifest | None = None) -> Path | None:
    """Return the folder of a run's command, to which its paths are relative; None if unknown.

    Args:
        manifest: of its sweep; None: looked for.
    """
    manifest = manifest or _find_sweep_manifest(run)
    if manifest is not None:
        return Path(manifest.cwd)
    try:
        return Path(OmegaConf.load(run / ".hydra" / "hydra.yaml").hydra.runtime.cwd)
    except Exception:  # made from Python, or a file of Hydra's that is another version's
        return None


def resolve_path(path: str, original_cwd: Path | None) -> str:
    """A path, or where it led when the run was made, if it leads nowhere here."""
    original_path = original_cwd / path if original_cwd else None
    return (
        str(original_path)
        if original_path and not Path(path).expanduser().exists() and original_path.exists()
        else path
    )


def _in_archive(path: str, typed: str, kept: dict[str, str]) -> str:
    """A path; where nothing is there, the archive's copy of it, if it has one."""
    return path if Path(path).expanduser().exists() else kept.get(typed, path)


def _compare_code(provenance: Provenance, result: RunResult, manifest: SweepManifest | None) -> None:
    then, now = result.git_commit, git_commit()
    hashed = result.code_hash or (manifest.code if manifest else None)
    edited = "+changes" in f"{then}{now}"
    # The same commit, edited: that the edits are the same, too, only the hash of the files can tell.
    provenance.add("code, commit", then, now, UNKNOWN if edited and then == now and hashed != code_hash() else None)
    provenance.add("code, hash of the files", hashed, code_hash())


def _compare_own_code(provenance: Provenance, then: dict[str, Any]) -> None:
    """Compare the user's Python files, a row each."""
    files = then.get("own_code", {}).get("files", [])
    names = Counter(Path(file["path"]).name for file in files)
    for file in files:
        path, digest = Path(file["path"]), file["sha256"]
        now = hash_file(path) if path.is_file() else None
        kept = f"kept as {file['copy']}" if file["copy"] else f"in commit {file['commit']}" if file["commit"] else None
        state = SAME if now == digest else DIFFERS
        where = f"{digest[:16]}{f' ({kept})' if kept else ''}"
        name = path.name if names[path.name] == 1 else f"{path.parent.name}/{path.name}"
        provenance.add(f"own code {name}", digest[:16] if now == digest else where, (now or "no such file")[:16], state)


def _compare_packages(provenance: Provenance, result: RunResult, then: dict[str, Any]) -> None:
    """Add a row for each package that differs and can matter, one for all others, one for those that are the same."""
    recorded = {normalise_name(n): v for n, v in result.versions.items() if n != "python"} | then.get("packages", {})
    now, used = list_packages(), then.get("own_code", {}).get("packages", [])
    # A package that is here and was not there counts where all were written down.
    names = {*recorded, *(now if "packages" in then else ())}
    differing = sorted(name for name in names if recorded.get(name) != now.get(name))
    relevant = [name for name in differing if can_change_results(name) or name in used]
    for name in relevant:
        then_version, now_version = (v.get(name, "not installed") for v in (recorded, now))
        provenance.add(f"package {name}", then_version, now_version, DIFFERS)
    rest = [name for name in differing if name not in relevant]
    if rest:
        listed = rest[:_SHOWN] + [f"{len(rest) - _SHOWN} more"] * (len(rest) > _SHOWN)
        before, after = (
            ", ".join(f"{n} {v.get(n, '-')}" if n in differing else n for n in listed) for v in (recorded, now)
        )
        provenance.add("packages that compute nothing", before, after, DIFFERS, matters=False)
    num_equal = len(names) - len(differing)
    provenance.add("packages", f"{num_equal} versions", f"{num_equal} versions")


def can_change_results(package: str) -> bool:
    """Whether another version of a package can change what a run comes to: it computes, samples, scores, reads data or
    words what the model is asked.
    """
    return package in _COMPUTING or package.startswith(_COMPUTING_FAMILIES)


def _compare_system(provenance: Provenance, result: RunResult, then: dict[str, Any]) -> None:
    """Compare Python, the operating system and its C library (whose functions round)."""
    was, is_now = then.get("python", {}).get("version") or result.versions.get("python"), platform.python_version()
    same_minor = was is not None and was.split(".")[:2] == is_now.split(".")[:2]
    provenance.add("Python", was, is_now, matters=not same_minor)
    before, now = then.get("system", {}), describe_system()
    for key, matters in (("libc", True), ("architecture", True), ("distribution", False), ("release", False)):
        if before.get(key) is not None or now[key] is not None:
            provenance.add(f"system, {key}", before.get(key), now[key], matters=matters)


def _compare_hardware(provenance: Provenance, then: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare processor, GPU, driver, and what torch was built for. On a GPU the processor only feeds it."""
    gpu = now["gpu"] is not None
    rows = [("processor", "model", not gpu), ("processor", "instructions", not gpu), ("torch_build", "cuda", gpu)]
    rows += [("gpu", "compute_capability", True), ("torch_build", "cudnn", True)] if gpu else []
    for part, key, matters in rows:
        recorded, current = (v.get(part) or {} for v in (then, now))
        if recorded.get(key) is not None or current.get(key) is not None:
            name = f"{part.replace('_build', ', built for')} {key}".replace("_", " ")
            provenance.add(name, recorded.get(key), current.get(key), matters=matters)
    if then.get("nvidia_driver") or now["nvidia_driver"]:
        provenance.add("NVIDIA driver", then.get("nvidia_driver"), now["nvidia_driver"], matters=gpu)


def _compare_data(
    provenance: Provenance, run: Path, result: RunResult, config: RunConfig, original_cwd: Path | None
) -> None:
    data, fix = config.dataset, f"restore the data at {config.dataset.path}"
    path: Any = data.path
    if data.generator is not None:  # in this machine's cache
        path = str(generate(data.generator, data.arguments))
        fix = f"delete {path}, so that it is generated again; if it still differs, use the code of {result.git_commit}"
        provenance.places |= {data.path: path} if path != data.path else {}
    else:
        kept = find_archived_data(run, result.data_hash)
        typed = [path] if isinstance(path, str) else [*path.values()]
        now_at = {p: _in_archive(resolve_path(p, original_cwd), p, kept) for p in typed}
        provenance.places |= {p: place for p, place in now_at.items() if place != p}
        path = now_at[path] if isinstance(path, str) else {split: now_at[p] for split, p in path.items()}
    try:
        now = hash_data(path, data.format)
    except (UserError, OSError):
        provenance.add("data", result.data_hash, f"not at {path}", MISSING, fix)
    else:
        provenance.add("data", result.data_hash, now, fix=fix)


def _compare_model(provenance: Provenance, result: RunResult, config: RunConfig, original_cwd: Path | None) -> None:
    model, place = config.model, resolve_path(config.model.path, original_cwd)
    if place != model.path:
        provenance.places[model.path] = place
    folder = Path(place).expanduser()
    gone = [f for f in ("config.json", *model.checkpoint_files) if not (folder / f).is_file()]
    then = result.model_hash
    if gone and model.download is not None:
        provenance.add("base model", then, "is downloaded when the run starts", UNKNOWN)
    elif gone:
        get = f"get it again: {download_command(model)}" if model.hub else f"put the model's files back into {folder}"
        provenance.add("base model", then, f"no {gone[0]} in {folder}", MISSING, get)
    else:
        now, fix = fingerprint(folder), f"put the files back that {folder} held when the run was made"
        provenance.add("base model", then, now, fix=fix if then is not None else None)


def _compare_tasks(provenance: Provenance, result: RunResult, config: RunConfig) -> None:
    keys = {e.task: e.key for e in result.evaluation}
    for name in config.eval.names:
        if name.file is not None and not name.file.is_file():
            provenance.add(f"task {name.label}", name.file, "no such file", MISSING, f"put {name.file} back")
        elif name.label in keys:
            provenance.add(f"task {name.label}", keys[name.label], item_key(name, config))


def _compare_machine(provenance: Provenance, result: RunResult, config: RunConfig, made_with: dict[str, Any]) -> None:
    """Precision, threads and processes are those of then, whatever this machine would choose."""
    from cruijff_kit.models.device import check_devices, choose_machine, describe_hardware, describe_machine

    then, processes = result.machine, result.settings.get("processes") or 1
    if processes != (config.gpus or 1):  # it was submitted with as many GPUs
        provenance.changed["gpus"] = processes
    try:
        machine = choose_machine(config.device, config.dtype, config.threads)
        own = describe_machine(machine)
        provenance.changed |= {k: then[k] for k in ("dtype", "threads") if then.get(k) not in (None, own[k])}
        if provenance.changed:
            machine = choose_machine(
                config.device,
                provenance.changed.get("dtype", config.dtype),
                provenance.changed.get("threads", config.threads),
            )
        check_devices(machine.device, processes)
    except UserError as error:
        what, _, fix = str(error).partition("; ")
        provenance.add("device", then.get("device"), what, MISSING, fix or "use a machine like the original one")
        return
    now = describe_machine(machine)
    for key in ("device", "dtype", "threads"):
        provenance.add(key, then.get(key), now[key])
    _compare_hardware(provenance, made_with, describe_hardware(machine))
