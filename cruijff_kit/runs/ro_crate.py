"""ro-crate-metadata.json: describe an archive for repositories and people who do not know cruijff_kit.

RO-Crate 1.1 (https://w3id.org/ro/crate/1.1): every file with its size and hash; each run as a CreateAction, from the base
model and the data to its folder, as the profile Process Run Crate wants it (https://w3id.org/ro/wfrun/process/0.5).
"""

import json
import mimetypes
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cruijff_kit.analysis.report.document import format_count
from cruijff_kit.records.archive_manifest import NAME as MANIFEST
from cruijff_kit.records.archive_manifest import ArchiveManifest
from cruijff_kit.records.result import RunResult, read_result
from cruijff_kit.util.files import write_text
from cruijff_kit.util.format import now

if TYPE_CHECKING:
    from rocrate.rocrate import ROCrate

NAME = "ro-crate-metadata.json"
_PROFILE = "https://w3id.org/ro/wfrun/process/0.5"
_TYPES = {".eval": "application/zip", ".jsonl": "application/jsonl", ".safetensors": "application/octet-stream",
          ".yaml": "application/yaml", ".md": "text/markdown", ".patch": "text/x-diff", ".py": "text/x-python"}  # fmt: skip
_STATES = {"done": "CompletedActionStatus", "failed": "FailedActionStatus"}


def write_crate(folder: Path, manifest: ArchiveManifest, runs: dict[str, RunResult], license: str | None) -> Path:
    """Write the description of an archive into its folder.

    Args:
        folder: the archive. manifest: what is in it. runs: path of a run below it ("." for the folder itself) -> result.
        license: of the archive: an address (https://spdx.org/licenses/CC-BY-4.0) or a sentence; None: none was named.
    """
    from rocrate.rocrate import ROCrate

    crate = ROCrate(version="1.1")
    _describe(crate, runs, license)
    files = dict(manifest.files)
    for data in manifest.data:
        if any((folder / path).is_file() for path in data.files):  # copied to the other folder only
            files |= data.files
    for path, known in files.items():
        crate.add_file(dest_path=path, properties=_describe_file(Path(path), known))
    crate.add_file(dest_path=MANIFEST, properties={"name": MANIFEST, "encodingFormat": "application/json"})
    software = _add_software(crate, runs)
    for path, result in runs.items():
        _add_run(crate, path, result, software, [p for p in files if path == "." or p.startswith(f"{path}/")])
    return write_text(folder / NAME, json.dumps(crate.metadata.generate(), indent=1, ensure_ascii=False) + "\n")


def read_runs(root: Path, runs: list[Path]) -> dict[str, RunResult]:
    """Read path below the archive -> result, of the runs that have one."""
    files = {run.relative_to(root).as_posix(): run / "result.json" for run in runs}
    return {path: read_result(file) for path, file in files.items() if file.is_file()}


def _describe(crate: "ROCrate", runs: dict[str, RunResult], license: str | None) -> None:
    experiments = sorted({r.experiment for r in runs.values()})
    models = sorted({r.model for r in runs.values()})
    crate.name = ", ".join(experiments) or "runs of cruijff_kit"
    crate.description = (
        f"{format_count(len(runs), 'fine-tuning run')} of {', '.join(models) or 'a language model'} with LoRA, trained and "
        "evaluated by cruijff_kit: configurations, metrics, evaluation logs, results and, where they were kept, adapters."
    )
    crate.datePublished = now()
    crate.license = license or "No licence was named; ask the authors."
    if license and license.startswith(("http://", "https://")):
        crate.license = crate.add_jsonld({"@id": license, "@type": "CreativeWork", "name": license})
    crate.root_dataset["conformsTo"] = {"@id": _PROFILE}
    crate.add_jsonld({"@id": _PROFILE, "@type": "CreativeWork", "name": "Process Run Crate", "version": "0.5"})


def _describe_file(path: Path, known: dict[str, Any]) -> dict[str, Any]:
    kind = _TYPES.get(path.suffix) or mimetypes.guess_type(path.name)[0] or "application/octet-stream"
    about = {"name": path.name, "encodingFormat": kind, "contentSize": str(known["bytes"])}
    return about | {"sha256": known["sha256"]}


def _add_software(crate: "ROCrate", runs: dict[str, RunResult]) -> dict[tuple[str, str], Any]:
    """Add each version of the software once; returns (version, commit) -> entity."""
    entities: dict[tuple[str, str], Any] = {}
    for result in runs.values():
        version, commit = _find_version(result)
        if (version, commit) not in entities:
            about = {"@id": f"#cruijff_kit-{commit}", "@type": "SoftwareApplication", "name": "cruijff_kit"}
            entities[version, commit] = crate.add_jsonld(about | {"softwareVersion": f"{version} ({commit})"})
    return entities


def _find_version(result: RunResult) -> tuple[str, str]:
    """Return version, and commit or (from a wheel) hash."""
    version = result.versions.get("cruijff_kit", "unknown")
    return version, result.git_commit or result.code_hash or version


def _add_run(
    crate: "ROCrate", path: str, result: RunResult, software: dict[tuple[str, str], Any], files: list[str]
) -> None:
    """Add a run as an action: its software, its inputs and its files."""
    used = [_add_input(crate, "base-model", result.model, result.model_hash)]
    if result.settings.get("dataset"):
        used.append(_add_input(crate, "data", str(result.settings["dataset"]), result.data_hash))
    action = {
        "@id": f"#run-{quote(path)}",
        "name": result.name,
        "startTime": result.started,
        "endTime": result.finished,
        "actionStatus": {"@id": f"http://schema.org/{_STATES.get(result.status, 'PotentialActionStatus')}"},
        "error": result.error and f"{result.error.type}: {result.error.message}",
        "description": ", ".join(f"{k}={v}" for k, v in result.settings.items() if v is not None),
    }
    outputs = [entity for file in files if (entity := crate.dereference(quote(file))) is not None]
    entity = crate.add_action(
        software[_find_version(result)],
        identifier=action.pop("@id"),
        object=used,
        result=outputs,
        properties={k: v for k, v in action.items() if v},
    )
    crate.root_dataset.append_to("mentions", entity)


def _add_input(crate: "ROCrate", kind: str, name: str, hash: str | None) -> Any:
    """Add the base model or a data set, which need not be part of the archive, under its hash."""
    identifier = f"#{kind}-{hash or name}"
    entity = crate.dereference(identifier)
    about = {"@id": identifier, "@type": "CreativeWork", "name": name, "identifier": hash}
    return entity or crate.add_jsonld({k: v for k, v in about.items() if v})
