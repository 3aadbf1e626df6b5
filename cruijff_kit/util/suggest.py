"""Suggest the nearest valid name: "did you mean ...?"."""

import argparse
import difflib
import re

from cruijff_kit.util import redaction


def find_nearest(name: str, valid: list[str]) -> str | None:
    """Return the valid name most like `name`; None if no name is similar enough."""
    matches = difflib.get_close_matches(name, valid, n=1, cutoff=0.7)
    return matches[0] if matches else None


def did_you_mean(name: str, valid: list[str]) -> str:
    """Return the end of an error message: the nearest valid name, else all of them."""
    near = find_nearest(name, valid)
    return f"did you mean {near}?" if near else f"valid: {', '.join(sorted(valid)) or redaction.WITHHELD}"


def suggest_flag(message: str, parser: argparse.ArgumentParser) -> str:
    """Return "did you mean --follow? " if an unknown flag is similar to a known one, else "".

    Args:
        message: of argparse.
    """
    flag = re.search(r"unrecognized arguments: (?:.* )?(--?[\w-]+)", message)
    near = find_nearest(flag[1], [*parser._option_string_actions]) if flag else None
    return f"did you mean {near}? " if near else ""
