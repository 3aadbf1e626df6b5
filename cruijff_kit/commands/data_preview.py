"""Rows as the model sees them, before anything is trained:

    cruijff-kit data preview dataset=files dataset.path=my.csv model=smollm2_135m [any setting of a run]
        [--rows N] [--split NAME] [--json]

Shows tokens and which of them are learnt, lengths and what is cut, the balance of the answers, repetitions within and
across splits, and answers that stand in their prompt. No weights are read, torch is not needed. --json: what `preview`
returns.
"""

import argparse
import dataclasses
import importlib
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

from cruijff_kit.commands.base import Parser
from cruijff_kit.config.data_policy import check_access
from cruijff_kit.config.groups import DatasetConfig
from cruijff_kit.config.run import RunConfig
from cruijff_kit.data.conversations import Conversation, read_columns, read_conversations
from cruijff_kit.data.dataset_files import hash_data
from cruijff_kit.data.examples import IGNORE, Example
from cruijff_kit.data.generators import generate
from cruijff_kit.data.leaks import find_leaks, find_targets_in_prompts
from cruijff_kit.data.packing import pack_sequences
from cruijff_kit.data.rows import prompt_columns
from cruijff_kit.data.tiers import RED
from cruijff_kit.models import download
from cruijff_kit.runs.leak_check import read_used_splits
from cruijff_kit.util.redaction import WITHHELD, quote_names

_LABELS = 20  # different answers up to which they are counted one by one


def preview(config: RunConfig, rows: int = 3, split: str | None = None) -> dict[str, Any]:
    """Return what the model will see of a run's data, as plain values.

    Args:
        config: the run.
        rows: how many rows to show token by token.
        split: whose rows to show; None: the training split's.
    Returns:
        data, hash, model, unused_columns; rows: token by token; splits: lengths and answers; leaks; targets_in_prompts;
        tier. Of red data neither rows nor answers.
    Raises:
        UserError: what a run would refuse in the data, repetitions apart.
    """
    data, red = config.dataset, check_access(config) == RED
    if data.generator is not None:
        generate(data.generator, data.arguments)
    download.fetch(config.model)
    tokenizer = _made(config.torchtune["tokenizer"])
    used = read_used_splits(data, config.test_splits)
    shown = split or data.train_split
    if shown not in used:
        options: dict[str, Any] = {"format": data.format, "split_column": data.split_column, "type": data.type}
        used[shown] = read_conversations(data.path, shown, data.column_map, data.prompt, data.system_prompt, **options)
    examples = {name: _examples(config, name, tokenizer, len(of)) for name, of in used.items()}
    answers = {c.row: c.answer for c in used[shown]}
    shown_rows = [] if red else examples[shown][:rows]
    leaks = find_leaks(used, unit_column=data.unit_column)
    report = {
        "data": data.path,
        "hash": hash_data(data.path, data.format),
        "model": config.model.name,
        "unused_columns": quote_names(_unused_columns(data, used[shown][0], shown)),
        "rows": [_shown(e, shown, tokenizer) | {"answer": answers[e.row]} for e in shown_rows],
        "splits": {name: _summary(name, examples[name], used[name], config) for name in used},
        "leaks": [dataclasses.asdict(leak) | {"says": str(leak)} for leak in leaks],
        "targets_in_prompts": {name: find_targets_in_prompts(of) for name, of in used.items()},
        "tier": data.tier,
    }
    return _without_contents(report, used) if red else report


def _without_contents(report: dict[str, Any], used: dict[str, list[Conversation]]) -> dict[str, Any]:
    """The report of red data: answers by number, the most frequent one first, and no prompts."""
    counted = Counter(c.answer for rows in used.values() for c in rows)
    numbers = {answer: f"answer {n}" for n, (answer, _) in enumerate(counted.most_common(), 1)}
    for split in report["splits"].values():
        split["answers"] = {numbers[answer]: count for answer, count in split["answers"].items()}
    for leak in report["leaks"]:
        leak["prompt"] = WITHHELD
    return report


def _examples(config: RunConfig, split: str, tokenizer: Any, count: int) -> list[Example]:
    data, node = config.dataset, dict(config.torchtune["dataset"])
    held_out = {s: data.max_test_samples for s in (data.test_split, *config.test_splits)}
    held_out |= {data.validation_split: data.max_validation_samples}
    node["max_samples"] = data.max_samples if split == data.train_split else held_out.get(split)
    return list(_made(node | {"split": split, "packed": False}, tokenizer))


def _made(node: dict[str, Any], *arguments: Any) -> Any:
    """The component of a torchtune config, without torchtune."""
    module, _, name = node["_component_"].rpartition(".")
    settings = {key: value for key, value in node.items() if key != "_component_"}
    return getattr(importlib.import_module(module), name)(*arguments, **settings)


def _unused_columns(data: DatasetConfig, first: Conversation, split: str) -> list[str]:
    """Columns that neither the prompt nor the answer comes from."""
    if first.has_messages:
        return []
    columns = read_columns(data.path, split, data.format, data.split_column)
    used = {data.column_map.get(name) or name for name in [*prompt_columns(data.prompt), "output"]}
    used |= {"prompt", "completion"} if data.column_map["output"] not in columns else set()
    return [c for c in columns if c not in used and c != data.split_column]


def _shown(example: Example, split: str, tokenizer: Any) -> dict[str, Any]:
    tokens = [
        {"text": text, "ids": ids, "learnt": example.labels[start] != IGNORE}
        for text, ids, start in _pieces(example.tokens, tokenizer)
    ]
    learnt = sum(label != IGNORE for label in example.labels)
    length = len(example.tokens)
    return {
        "split": split,
        "row": example.row,
        "length": length,
        "learnt": learnt,
        "cut": example.cut,
        "tokens": tokens,
    }


def _pieces(ids: list[int], tokenizer: Any) -> list[tuple[str, list[int], int]]:
    """(text, its ids, index of the first): one token each, but for characters that several tokens make up."""
    pieces, before, start = [], "", 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            continue
        pieces.append((text[len(before) :], ids[start:end], start))
        before, start = text, end
    return pieces


def _summary(split: str, examples: list[Example], asked: list[Conversation], config: RunConfig) -> dict[str, Any]:
    lengths = sorted(len(e.tokens) for e in examples)
    answers = Counter(c.answer for c in asked)
    summary = {
        "rows": len(examples),
        "tokens": {
            "shortest": lengths[0],
            "median": statistics.median_low(lengths),
            "95%": lengths[int(0.95 * (len(lengths) - 1))],
            "longest": lengths[-1],
        },
        "learnt_tokens": sum(label != IGNORE for e in examples for label in e.labels),
        "cut_rows": sum(e.cut > 0 for e in examples),
        "different_answers": len(answers),
        "answers": dict(answers.most_common(_LABELS)),
    }
    if config.dataset.packed and split == config.dataset.train_split:
        summary["packs"] = len(pack_sequences(examples, config.dataset.max_seq_len))
    return summary


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = Parser("data preview", "Rows as the model sees them.", "print everything as JSON")
    parser.add_argument(
        "settings", metavar="SETTING", nargs="*", help="as for python -m cruijff_kit.train: dataset=files ..."
    )
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show token by token (default: 3)")
    parser.add_argument("--split", metavar="NAME", help="whose rows to show (default: the training split's)")
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with your own YAML")

    def command(options: argparse.Namespace) -> dict[str, Any]:
        from cruijff_kit.commands.data_preview_view import show
        from cruijff_kit.config.compose import compose

        config_dir = options.config_dir and str(Path(options.config_dir).expanduser())
        report = preview(compose(options.settings, config_dir), max(0, options.rows), options.split)
        if not options.json:
            show(report)
        return report

    return parser.run(argv, command)
