"""Compare two recordings of record.py: print every difference that a rename does not explain; exit code 1 if there is one.

python compare.py OLD.json NEW.json [SECTION ...]

The last lines count the differences of each section: in texts, in values (numbers, hashes, exit codes), and what is only in
one of the two (keys, files).
"""

import difflib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What was renamed: regular expression -> replacement (re.sub), applied in this order to each key and text of OLD.
RENAMES: dict[str, str] = {
    r"\bpack=": "multi_lora=",
    r"^pack$": "multi_lora",
    r"^packs$": "groups",
    r"(?m)^pack:": "multi_lora:",
    r"\beval/untrained\b": "eval/base_model",
    r"^untrained/": "base_model/",
    r"\buntrained model\b": "base model",
    r", untrained\b": " (base model)",
    r"\buntrained\b": "base model",
    r"^ceiling": "bayes_optimum",
    r"^late_error$": "posthoc_error",
    r"^late$": "posthoc_evaluation",
    r"^attempts$": "submissions",
    r"^on_their_way$": "active",
    r"^conditions$": "provenance",
    r"^agreement$": "verdict",
    r"^verdicts$": "findings",
    r"^learnt_tokens$": "target_tokens",
    r"^learnt$": "target",
    r"python -m cruijff_kit\.(?!train\b)(\w+)": r"cruijff-kit \1",
    r"cruijff_kit\.cluster\.job": "cruijff_kit.sweep.job",
}

Difference = tuple[tuple[str, ...], str, list[str]]

_ABSENT = object()
_LISTED = re.compile(r"(?<=valid: )[\w.@/-]+(?:, [\w.@/-]+)+")  # sorted lists of names, whose order a rename changes
_LONGEST = 300


def rename(value: Any) -> Any:
    """A value of OLD with the names of NEW.

    Raises:
        ValueError: two keys of one dictionary would become the same.
    """
    if isinstance(value, dict):
        renamed = {rename(key): rename(item) for key, item in value.items()}
        if len(renamed) < len(value):
            raise ValueError(f"renames give two of these keys one name: {', '.join(value)}")
        return renamed
    if isinstance(value, list):
        return [rename(item) for item in value]
    if isinstance(value, str):
        for pattern, replacement in RENAMES.items():
            value = re.sub(pattern, replacement, value)
    return value


def find_differences(old: Any, new: Any, where: tuple[str, ...] = ()) -> Iterator[Difference]:
    """Where two values differ: the keys, the kind of difference, and the lines that show it."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from find_differences(old.get(key, _ABSENT), new.get(key, _ABSENT), (*where, key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for number, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from find_differences(one, other, (*where, str(number)))
    elif isinstance(old, str) and isinstance(new, str):
        if _sort_lists(old) != _sort_lists(new):
            yield where, "texts", _diff_texts(old, new)
    elif old != new or type(old) is not type(new):
        kind = "only in one" if old is _ABSENT or new is _ABSENT else "values"
        yield where, kind, [f"- {_shorten(old)}", f"+ {_shorten(new)}"]


def _sort_lists(text: str) -> str:
    return _LISTED.sub(lambda match: ", ".join(sorted(match[0].split(", "))), text)


def _diff_texts(old: str, new: str) -> list[str]:
    one, other = old.splitlines(), new.splitlines()
    lines = difflib.unified_diff(one, other, n=0, lineterm="") if one != other else ["- a last line break", "+ or none"]
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def _shorten(value: Any) -> str:
    text = "(nothing)" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ... ({len(text)} characters)"


def count(value: Any) -> int:
    """How many texts, numbers and the like a value holds."""
    if isinstance(value, dict | list):
        return sum(map(count, value.values() if isinstance(value, dict) else value))
    return 1


def main() -> int:
    """The command; returns the exit code."""
    old, new = (json.loads(Path(name).read_text()) for name in sys.argv[1:3])
    if sections := sys.argv[3:]:
        old, new = ({k: v for k, v in recording.items() if k in sections} for recording in (old, new))
    kinds: Counter[tuple[str, str]] = Counter()
    for where, kind, lines in find_differences(rename(old), new):
        kinds[where[0], kind] += 1
        print(" > ".join(where), *lines, sep="\n  ", end="\n\n")
    print(f"{count(old)} values compared with {count(new)}: {sum(kinds.values())} differences")
    for (section, kind), number in sorted(kinds.items()):
        print(f"  {section}: {number} {kind}")
    return int(bool(kinds))


if __name__ == "__main__":
    raise SystemExit(main())
