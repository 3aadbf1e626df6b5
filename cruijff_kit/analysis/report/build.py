"""Read the runs, build every section, and write the page, figures, data and methods text."""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.report.calibration import build_calibration
from cruijff_kit.analysis.report.costs import build_costs, format_digits, sum_hours
from cruijff_kit.analysis.report.curves import build_curves
from cruijff_kit.analysis.report.document import Chart, Section, format_value
from cruijff_kit.analysis.report.effects import build_effects
from cruijff_kit.analysis.report.groups import build_groups
from cruijff_kit.analysis.report.load import Runs, read_runs
from cruijff_kit.analysis.report.methods import build_methods, compose_methods
from cruijff_kit.analysis.report.outcomes import collect_outcomes
from cruijff_kit.analysis.report.overview import build_overview, describe_states, list_commands, make_title
from cruijff_kit.analysis.report.ranking import build_ranking
from cruijff_kit.analysis.report.samples import build_samples
from cruijff_kit.analysis.report.scores import build_scores
from cruijff_kit.analysis.report.unfinished_runs import build_failures
from cruijff_kit.analysis.report.wording import format_interval, format_percent
from cruijff_kit.util.files import write_text
from cruijff_kit.util.format import now
from cruijff_kit.util.progress import progress

PAGE, METHODS, FOLDER = "report.html", "methods.txt", "report"
_FILE_LIST = ".files.json"  # the files of the last report: the next one removes these, and nothing else
SECTION_BUILDERS: tuple[Callable[[Runs], Section], ...] = (
    build_overview, build_ranking, build_curves, build_effects, build_scores, build_calibration, build_groups,
    build_samples, build_costs, build_failures, build_methods,
)  # fmt: skip


@dataclass
class Report:
    """The files of a report, and its data."""

    html: Path
    """The page."""
    methods: Path
    """The methods text."""
    figures: list[Path]
    """PNG files, in the order of the sections."""
    tables: list[Path]
    """CSV files, in the order of the sections."""
    data: dict[str, Any]
    """The data of `cruijff-kit report --json`."""


def write_report(folder: Path, target: Path | None = None) -> Report:
    """Write the report of the runs below a folder.

    Args:
        folder: a run, a sweep, or any folder above.
        target: the folder of the report; default: `folder`.
    Raises:
        UserError: no such folder, no run in it, or matplotlib is missing.
    """
    target = (target or folder).absolute()
    with progress("report", len(SECTION_BUILDERS) + 2) as bar:
        runs = read_runs(folder)
        bar.advance("read")
        sections = []
        for build in SECTION_BUILDERS:
            sections.append(build(runs))
            bar.advance(sections[-1].title)
        report = _write(runs, sections, target)
        bar.advance("written")
    return report


def _write(runs: Runs, sections: list[Section], folder: Path) -> Report:
    _remove_previous(folder)
    figures = [_write_bytes(folder / FOLDER / f"{c.name}.png", c.png) for s in sections for c in s.charts]
    tables = [write_text(folder / FOLDER / f"{t.name}.csv", t.csv()) for s in sections for t in s.tables]
    write_text(folder / FOLDER / _FILE_LIST, json.dumps([p.name for p in (*figures, *tables)]))
    text = write_text(folder / METHODS, compose_methods(runs) + "\n")
    data = _collect_data(runs, sections)
    html = write_text(folder / PAGE, render_page(runs, sections, data))
    return Report(html, text, figures, tables, data)


def _remove_previous(folder: Path) -> None:
    try:
        names = json.loads((folder / FOLDER / _FILE_LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for name in names if isinstance(names, list) else []:
        path = folder / FOLDER / Path(str(name)).name
        if path.suffix in (".png", ".csv"):
            path.unlink(missing_ok=True)


def _write_bytes(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _collect_data(runs: Runs, sections: list[Section]) -> dict[str, Any]:
    return {
        "title": make_title(runs),
        "folder": str(runs.folder.absolute()),
        "commands": list_commands(runs),
        "states": dict(runs.count_states()),
        **sum_hours(runs),
        "best": [
            f.ranking.to_dict()
            | {"metric": "/".join(f.source) if f.source else f.objective, "folder": str(f.best_run.folder)}
            for f in runs.families
        ],
        "detectable_difference": {task: d.to_dict() for task, d in runs.analysis.detectable.items()},
        "sections": {
            s.id: {
                "title": s.title,
                "text": s.text,
                "absent": s.absent or None,
                "tables": {t.name: {"caption": t.caption, "rows": t.records()} for t in s.tables},
                "samples": [asdict(sample) for sample in s.samples],
            }
            for s in sections
        },
    }  # fmt: skip


def render_page(runs: Runs, sections: list[Section], data: dict[str, Any]) -> str:
    """Return report.html: one file, whose Content-Security-Policy forbids it to load anything."""
    import jinja2

    source = files("cruijff_kit.analysis.report")
    script = (source / "page_script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.tests["chart"] = lambda block: isinstance(block, Chart)
    template = environment.from_string((source / "page.html").read_text(encoding="utf-8"))
    return template.render(
        title=data["title"],
        folder=data["folder"],
        commands=data["commands"],
        states=describe_states(runs),
        tiles=_make_tiles(runs, data),
        sections=[s for s in sections if not s.absent],
        absent=[s for s in sections if s.absent],
        time=now().replace("T", " ").replace("+00:00", " UTC"),
        script=script,
        digest=digest,
        data_folder=FOLDER,
    )


def _make_tiles(runs: Runs, data: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the key figures: (number, its label)."""
    tiles = [(f"{runs.count_states()['done']} of {len(runs.all_runs)}", "runs done")]
    for family, outcome in zip(runs.families[:2], collect_outcomes(runs), strict=False):
        e = outcome.estimate(outcome.configurations[0])
        best = "best " if len(family.ranking.configurations) > 1 else ""
        interval = f", {format_percent(e.level)} {format_interval(e)}" if e.low is not None else ""
        tiles.append((format_value(e.value), f"{best}{family.name} ({family.ranking.split} split{interval})"))
    kinds = (("gpu_hours", "GPU-hours"), ("cpu_hours", "CPU-hours"))
    return tiles + [(format_digits(data[key]), label) for key, label in kinds if data[key] > 0]
