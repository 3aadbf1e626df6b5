"""`python -m cruijff_kit.data preview ...` and `python -m cruijff_kit.data convert ...`; `--help` after each says more."""

import sys

from cruijff_kit import answer
from cruijff_kit.command import json_asked, run_command
from cruijff_kit.data import convert, preview
from cruijff_kit.errors import UserError

_COMMANDS = {"preview": preview.main, "convert": convert.main}
_USAGE = """\
python -m cruijff_kit.data preview dataset=files dataset.path=my.csv    rows as the model sees them
python -m cruijff_kit.data convert SOURCE FOLDER                        any layout to Parquet"""


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in _COMMANDS:
        return _COMMANDS[argv[0]](argv[1:])
    return run_command(lambda: _about(argv), json_asked(argv))


def _about(argv: list[str]) -> None:
    if "-h" in argv or "--help" in argv:
        answer.record(help=_USAGE)
        print(_USAGE)
        return
    from cruijff_kit.hints import did_you_mean

    print(_USAGE, file=sys.stderr)
    name = next((a for a in argv if not a.startswith("-")), None)
    if name is None:
        raise UserError("a command is missing; preview or convert")
    raise UserError(f"cruijff_kit.data has no command {name}; {did_you_mean(name, [*_COMMANDS])}")


if __name__ == "__main__":
    raise SystemExit(main())
