"""Write the report of all runs below a folder: `cruijff-kit report DIR [--to DIR2] [--methods] [--json]`.

Writes report.html (one file, which opens without a network), report/*.png and *.csv (every figure, and the data behind
every figure and table) and methods.txt (paragraphs for a paper).

--json: {html, methods_file, figures: [...], tables: [...], title, folder, commands: [...], states: {state: runs},
gpu_hours, cpu_hours, best: [{runs, configurations, leader, value, chosen_by, split, of, note, metric, folder}],
detectable_difference: {task: {...}}, sections: {id: {title, text: [...], absent,
tables: {name: {caption, rows: [{column: value}]}}, samples: [{run, task, right, prompt, target, answer, score}]}}}; the
ids are overview, best, losses, effects, scores, calibration, groups, samples, costs, failures and methods; absent is the
reason why a section is empty. With --methods: {text}.
"""

import argparse
from pathlib import Path
from typing import Any

from cruijff_kit.commands.base import Parser

_OVERVIEWS = ("results.csv", "experiment_summary.md")


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = Parser("report", "One page on the runs below a folder, its figures and their data, and a methods text.",
                    json_help="the report's paths and data as one JSON document")  # fmt: skip
    parser.add_argument("folder", metavar="DIR", type=Path, help="a run, a sweep, or any folder above them")
    parser.add_argument("--to", metavar="DIR2", type=Path, help="where to write; default: DIR")
    parser.add_argument("--methods", action="store_true", help="print the methods text and write nothing")

    def write(options: argparse.Namespace) -> dict[str, Any]:
        if options.methods:
            return _print_methods(options.folder)
        from cruijff_kit.analysis.report.build import write_report
        from cruijff_kit.analysis.summary import write_overviews

        report = write_report(options.folder, options.to)
        if options.to is None and any((options.folder / name).exists() for name in _OVERVIEWS):
            write_overviews(options.folder)  # otherwise they may list fewer runs than the page in the same folder
        print(f"{report.html}\n{len(report.figures)} figures and {len(report.tables)} tables of data in "
              f"{report.html.parent / 'report'}; methods in {report.methods}")  # fmt: skip
        paths = {"figures": [*map(str, report.figures)], "tables": [*map(str, report.tables)]}
        return {"html": str(report.html), "methods_file": str(report.methods), **paths, **report.data}

    return parser.run(argv, write)


def _print_methods(folder: Path) -> dict[str, str]:
    from cruijff_kit.analysis.report.load import read_runs
    from cruijff_kit.analysis.report.methods import compose_methods

    text = compose_methods(read_runs(folder))
    print(text)
    return {"text": text}


if __name__ == "__main__":
    raise SystemExit(main())
