"""`python -m cruijff_kit.data preview ...` and `python -m cruijff_kit.data convert ...`; `--help` after each says more."""

import sys

from cruijff_kit.data import convert, preview

_COMMANDS = {"preview": preview.main, "convert": convert.main}


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] not in _COMMANDS:
        wanted = bool(argv) and argv[0] in ("-h", "--help")
        print(
            "python -m cruijff_kit.data preview dataset=files dataset.path=my.csv    rows as the model sees them\n"
            "python -m cruijff_kit.data convert SOURCE FOLDER                        any layout to Parquet",
            file=sys.stdout if wanted else sys.stderr,
        )
        return 0 if wanted else 2
    return _COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
