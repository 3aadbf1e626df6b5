"""Results as a table: `cruijff-kit table DIR [--epochs] [--json | --csv]`.

Everything is read from the runs' result.json, the samples behind intervals and comparisons from their .eval logs. --json:
the results with comparisons, the best, configurations, and the smallest difference that could be found.
"""

import argparse
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.results_frame import read_results, split_by_epoch, to_dict, to_frame
from cruijff_kit.analysis.results_table import show_results
from cruijff_kit.commands.base import Parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return the exit code."""
    every = "every result.json with comparisons, the best, configurations and power, as one JSON document"
    parser = Parser("table", "Results of the runs below a folder.", every)
    parser.add_argument("folder", metavar="DIR", help="a run, a sweep, or any folder above them")
    parser.add_argument("--epochs", action="store_true", help="a row for each evaluated epoch (--json has them anyway)")
    parser.add_argument("--csv", action="store_true", help="one line per run, as results.csv has it")

    def command(options: argparse.Namespace) -> dict[str, Any] | None:
        if options.json and options.csv:
            parser.error("argument --csv: not allowed with argument --json")
        results = read_results(options.folder)
        if options.json:
            return to_dict(results)
        results = split_by_epoch(results) if options.epochs else results
        if options.csv:
            print(to_frame(results).to_csv(index=False), end="")
        else:
            show_results(Path(options.folder), results)
        return None

    return parser.run(argv, command)


if __name__ == "__main__":
    raise SystemExit(main())
