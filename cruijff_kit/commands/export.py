"""An adapter of a run for use elsewhere: `cruijff-kit export RUN_DIR [--epoch N] [--merged] --to DIR [--json]`.

Without --merged: the adapter in PEFT's format. With it: a whole model, base and adapter in one, that transformers loads.
--json: {"run", "epoch", "base", "merged", "to", "files": [{"path", "bytes"}], "bytes"}.
"""

import argparse
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.commands.base import Parser
from cruijff_kit.models.adapter_files import ADAPTER_CONFIG
from cruijff_kit.records.archive_manifest import reject_archived, require_epochs
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import atomic


@dataclass(frozen=True)
class Exported:
    """Exported files."""

    run: str
    """Its folder."""
    epoch: int
    """Epoch of its adapter, counted from 0."""
    base: str
    """The folder of the base model."""
    merged: bool
    to: str
    """The new folder."""


def export(run: str | Path, to: str | Path, epoch: int | None = None, merged: bool = False) -> Exported:
    """Copy an adapter of a run, or merge it with its base model.

    Args:
        run: the run's folder.
        to: folder to make.
        epoch: counted from 0; None: the last one that was saved.
        merged: write the whole model.
    Raises:
        UserError: no such run or epoch, `to` exists, or the base model is gone.
    """
    folder, to = RunFolder(run), Path(to).expanduser().absolute()
    if folder.result.exists():
        read_result(folder.result)  # of red data, what an adapter has learnt is the owner's alone too
    saved = require_epochs(folder)
    if epoch is not None and epoch not in saved:
        reject_archived(folder.path, [epoch])
        raise UserError(
            f"{folder.path} holds no adapter of epoch {epoch}; there: {', '.join(map(str, saved))} (counted from 0)"
        )
    epoch = saved[-1] if epoch is None else epoch
    if to.exists():
        raise UserError(f"--to {to} exists already; choose another folder")
    adapter = folder.epoch(epoch)
    base = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    if merged:
        if not Path(base).is_dir():
            raise UserError(
                f"the base model of {adapter} was {base}, which is missing; restore it, or write its new place into "
                f"base_model_name_or_path in {adapter}/{ADAPTER_CONFIG}"
            )
        from cruijff_kit.models.merge import merge  # torch

        merge(base, adapter, to)
    else:
        _copy(adapter, to)
    return Exported(str(folder.path), epoch, base, merged, str(to))


def _copy(adapter: Path, to: Path) -> None:
    with atomic(to) as draft:
        shutil.copytree(adapter, draft)


def _to_dict(done: Exported) -> dict[str, Any]:
    paths = [p for p in sorted(Path(done.to).rglob("*")) if p.is_file()]
    files: list[dict[str, Any]] = [{"path": str(p), "bytes": p.stat().st_size} for p in paths]
    return asdict(done) | {"files": files, "bytes": sum(f["bytes"] for f in files)}


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    parser = Parser("export", "An adapter of a run, or a whole model.", "what was written, with sizes, as JSON")
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="a run's folder")
    parser.add_argument("--epoch", type=int, metavar="N", help="counted from 0; default: the last one that was saved")
    parser.add_argument("--merged", action="store_true", help="base model and adapter merged, instead of the adapter")
    parser.add_argument("--to", metavar="DIR", type=Path, required=True, help="the new folder")

    def command(options: argparse.Namespace) -> dict[str, Any]:
        done = export(options.run, options.to, options.epoch, options.merged)
        if not options.json:
            what = "base model and adapter, merged," if done.merged else "adapter"
            print(f"{what} of epoch {done.epoch} written to {done.to}")
        return _to_dict(done)

    return parser.run(argv, command)


if __name__ == "__main__":
    raise SystemExit(main())
