"""What a command would do, shown without reading any weights (dry_run=true)."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from cruijff_kit.cluster.client import ClusterError
from cruijff_kit.config import RunConfig
from cruijff_kit.errors import UserError
from cruijff_kit.plan import Plan, check

if TYPE_CHECKING:
    from rich.console import Console


def show(runs: list[tuple[RunConfig, dict[str, Any]]], folder: Path) -> None:
    """Print every run with what differs, its steps, tokens and estimates; the torchtune configs, the first whole, of the
    others what differs from it; and what would be submitted to SLURM.

    Args:
        runs: config and swept values of each run.
        folder: where the runs would lie.
    Raises:
        UserError: a run that cannot work.
    """
    from rich.console import Console
    from rich.table import Table

    plans = [check(config) for config, _ in runs]
    table = Table(title=f"{len(runs)} run{'s' * (len(runs) > 1)}; nothing is started", title_justify="left")
    columns = [
        "run",
        *runs[0][1],
        "rows",
        "batch",
        "steps/epoch",
        "steps",
        "warm-up",
        "tokens",
        "trained",
        "memory",
        "disk",
    ]
    for column in columns:
        table.add_column(column, justify="left" if column == "run" else "right", overflow="fold")
    for (config, swept), plan in zip(runs, plans, strict=True):
        table.add_row(config.run_name, *map(str, swept.values()), *_cells(plan))
    console = Console(width=None if Console().is_terminal else 200, highlight=False)
    console.print(table)
    for (config, _), plan in zip(runs, plans, strict=True):
        for note in _notes(plan):
            console.print(f"{config.run_name}: {note}", markup=False)
    first = dict(_leaves(runs[0][0].torchtune))
    for number, (config, _) in enumerate(runs):
        differs = ", where it differs" if number else ""
        console.print(f"\n# torchtune config of {config.run_name}{differs}", markup=False)
        shown = {k: v for k, v in _leaves(config.torchtune) if first.get(k) != v} if number else config.torchtune
        console.print(OmegaConf.to_yaml(OmegaConf.create(shown)).rstrip(), markup=False, soft_wrap=True)

    _show_arrays([c for c, _ in runs if c.slurm.submit], folder.absolute(), console)


def _show_arrays(configs: list[RunConfig], folder: Path, console: "Console") -> None:
    """The sbatch script of each array, and what `sbatch --test-only` says to it."""
    if not configs:
        return
    from cruijff_kit.cluster import submit
    from cruijff_kit.cluster.request import sbatch_options

    runs = [submit.Submission(Path(c.output_dir), sbatch_options(c), c.slurm.max_parallel) for c in configs]
    refused = []
    for number, array in enumerate(arrays := submit.arrays_of(runs), 1):
        console.print(f"\n# array {number} of {len(arrays)}: {array.what}", markup=False, soft_wrap=True)
        console.print(submit.script(array, folder).rstrip(), markup=False, soft_wrap=True)
        try:
            answer = submit.test_only(array, folder, os.getcwd())
        except ClusterError as error:
            refused.append(str(error))
            answer = f"refused: {error}"
        console.print(f"# sbatch --test-only: {answer}", markup=False, soft_wrap=True)
    if refused:
        raise UserError(refused[0])


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in a tree."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _cells(plan: Plan) -> list[str]:
    steps = plan.steps
    return [
        f"{plan.rows}",
        f"{plan.effective_batch}",
        f"{steps['per_epoch']}",
        f"{steps['total']}",
        f"{steps['warmup']}",
        f"{plan.tokens}",
        f"{plan.trainable_parameters} ({plan.trainable_parameters / plan.total_parameters:.2%})",
        size(plan.memory_bytes),
        size(plan.disk_bytes),
    ]


def _notes(plan: Plan) -> list[str]:
    notes = list(plan.warnings)
    for found, count in plan.leaks.items():
        if found.startswith("target "):
            notes.append(f"in {count} rows of split {found.removeprefix('target ')!r} the answer stands in the prompt")
    if plan.packed_rows is not None:
        notes.append(f"{plan.packed_rows} rows in {plan.rows} packs; a pack counts as a row")
    return notes


def size(number: float) -> str:
    """Bytes for people: 1.3 GB."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"
