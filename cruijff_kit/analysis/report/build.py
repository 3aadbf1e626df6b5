"""Reading the runs, making every section, and writing page, figures, data and methods text."""

import base64
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.report.calibration import calibration
from cruijff_kit.analysis.report.costs import costs, few_digits, hours
from cruijff_kit.analysis.report.curves import curves
from cruijff_kit.analysis.report.document import Chart, Section, shown
from cruijff_kit.analysis.report.effects import effects
from cruijff_kit.analysis.report.failed import failed
from cruijff_kit.analysis.report.groups import groups
from cruijff_kit.analysis.report.load import Runs, read_runs
from cruijff_kit.analysis.report.methods import methods, methods_text
from cruijff_kit.analysis.report.outcomes import outcomes_of
from cruijff_kit.analysis.report.overview import commands, overview, states_in_words, title
from cruijff_kit.analysis.report.ranking import ranking
from cruijff_kit.analysis.report.samples import samples
from cruijff_kit.analysis.report.scores import scores
from cruijff_kit.analysis.report.wording import percent, range_in_words
from cruijff_kit.util.files import write_text
from cruijff_kit.util.format import now
from cruijff_kit.util.progress import progress

PAGE, METHODS, FOLDER = "report.html", "methods.txt", "report"
_LIST = ".files.json"  # what the last report wrote: the next one removes it, and nothing else
SECTIONS: tuple[Callable[[Runs], Section], ...] = (
    overview, ranking, curves, effects, scores, calibration, groups, samples, costs, failed, methods,
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
    """As `cruijff-kit report --json` documents it."""


def write_report(folder: Path, to: Path | None = None) -> Report:
    """Report on the runs below a folder.

    Args:
        folder: a run, a sweep, or any folder above.
        to: where to write; the folder itself unless given.
    Raises:
        UserError: no such folder, no run in it, or matplotlib is missing.
    """
    to = (to or folder).absolute()
    with progress("report", len(SECTIONS) + 2) as bar:
        runs = read_runs(folder)
        bar.advance("read")
        sections = []
        for make in SECTIONS:
            sections.append(make(runs))
            bar.advance(sections[-1].title)
        report = _write(runs, sections, to)
        bar.advance("written")
    return report


def _write(runs: Runs, sections: list[Section], to: Path) -> Report:
    _remove_last(to)
    figures = [_written(to / FOLDER / f"{c.name}.png", c.png) for s in sections for c in s.charts]
    tables = [write_text(to / FOLDER / f"{t.name}.csv", t.csv()) for s in sections for t in s.tables]
    write_text(to / FOLDER / _LIST, json.dumps([p.name for p in (*figures, *tables)]))
    text = write_text(to / METHODS, methods_text(runs) + "\n")
    data = _data(runs, sections)
    html = write_text(to / PAGE, page(runs, sections, data))
    return Report(html, text, figures, tables, data)


def _remove_last(to: Path) -> None:
    try:
        names = json.loads((to / FOLDER / _LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    for name in names if isinstance(names, list) else []:
        path = to / FOLDER / Path(str(name)).name
        if path.suffix in (".png", ".csv"):
            path.unlink(missing_ok=True)


def _written(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _data(runs: Runs, sections: list[Section]) -> dict[str, Any]:
    return {
        "title": title(runs),
        "folder": str(runs.folder.absolute()),
        "commands": commands(runs),
        "states": dict(runs.states()),
        **hours(runs),
        "best": [
            f.ranking.to_dict() | {"metric": "/".join(f.source) if f.source else f.objective, "folder": str(f.best.folder)}
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


def page(runs: Runs, sections: list[Section], data: dict[str, Any]) -> str:
    """report.html: everything in one file; its policy forbids it to load anything."""
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
        states=states_in_words(runs),
        tiles=_tiles(runs, data),
        sections=[s for s in sections if not s.absent],
        absent=[s for s in sections if s.absent],
        written=now().replace("T", " ").replace("+00:00", " UTC"),
        script=script,
        digest=digest,
        data_folder=FOLDER,
    )


def _tiles(runs: Runs, data: dict[str, Any]) -> list[tuple[str, str]]:
    """What one wants to know first: (number, what it is)."""
    tiles = [(f"{runs.states()['done']} of {len(runs.all)}", "runs done")]
    for family, outcome in zip(runs.families[:2], outcomes_of(runs), strict=False):
        e = outcome.estimate(outcome.configurations[0])
        best = "best " if len(family.ranking.configurations) > 1 else ""
        ends = f", {percent(e.level)} {range_in_words(e)}" if e.low is not None else ""
        tiles.append((shown(e.value), f"{best}{family.name} ({family.ranking.split} split{ends})"))
    kinds = (("gpu_hours", "GPU-hours"), ("cpu_hours", "CPU-hours"))
    return tiles + [(few_digits(data[key]), what) for key, what in kinds if data[key] > 0]
