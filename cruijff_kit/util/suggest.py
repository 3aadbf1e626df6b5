"""Did you mean: the nearest valid name."""

import argparse
import difflib
import re

from cruijff_kit.util import redaction


def nearest(name: str, valid: list[str]) -> str | None:
    """The valid name most like `name`, if any is alike enough to be meant."""
    found = difflib.get_close_matches(name, valid, n=1, cutoff=0.7)
    return found[0] if found else None


def did_you_mean(name: str, valid: list[str]) -> str:
    """The end of a refusal: the nearest valid name, else all of them."""
    near = nearest(name, valid)
    return f"did you mean {near}?" if near else f"valid: {', '.join(sorted(valid)) or redaction.WITHHELD}"


def suggest_flag(message: str, parser: argparse.ArgumentParser) -> str:
    """ "did you mean --follow? ", where a flag that does not exist is like one that does."""
    flag = re.search(r"unrecognized arguments: (?:.* )?(--?[\w-]+)", message)
    near = nearest(flag[1], [*parser._option_string_actions]) if flag else None
    return f"did you mean {near}? " if near else ""
