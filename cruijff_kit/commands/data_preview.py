"""Show rows as the model sees them, before training:

    cruijff-kit data preview dataset=files dataset.path=my.csv model=smollm2_135m [any setting of a run]
        [--rows N] [--split NAME] [--json]

It shows tokens and which of them are targets (have a loss), lengths and truncation, the balance of the answers, repetitions
within and across splits, and prompts that contain their answer. It reads no weights and does not need torch. --json prints
the dict that `preview` returns.
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

_MAX_ANSWERS = 20  # different answers that are counted, the most frequent ones


def preview(config: RunConfig, rows: int = 3, split: str | None = None) -> dict[str, Any]:
    """Return the data of a run as the model sees it, for JSON.

    Args:
        config: the run.
        rows: number of rows to show token by token.
        split: the split of these rows; None: the training split.
    Returns:
        data, hash, model, unused_columns; rows: token by token; splits: lengths and answers; leaks; targets_in_prompts;
        tier. For red data without rows and answers.
    Raises:
        UserError: as a run with this data raises, except for repetitions.
    """
    data, is_red = config.dataset, check_access(config) == RED
    if data.generator is not None:
        generate(data.generator, data.arguments)
    download.fetch(config.model)
    tokenizer = _build(config.torchtune["tokenizer"])
    conversations = read_used_splits(data, config.test_splits)
    split_shown = split or data.train_split
    if split_shown not in conversations:
        options: dict[str, Any] = {"format": data.format, "split_column": data.split_column, "type": data.type}
        conversations[split_shown] = read_conversations(
            data.path, split_shown, data.column_map, data.prompt, data.system_prompt, **options
        )
    examples = {name: _examples(config, name, tokenizer, len(split_rows)) for name, split_rows in conversations.items()}
    answers = {c.row: c.answer for c in conversations[split_shown]}
    shown_rows = [] if is_red else examples[split_shown][:rows]
    leaks = find_leaks(conversations, unit_column=data.unit_column)
    report = {
        "data": data.path,
        "hash": hash_data(data.path, data.format),
        "model": config.model.name,
        "unused_columns": quote_names(_find_unused_columns(data, conversations[split_shown][0], split_shown)),
        "rows": [_describe_row(e, split_shown, tokenizer) | {"answer": answers[e.row]} for e in shown_rows],
        "splits": {name: _summarise(name, examples[name], conversations[name], config) for name in conversations},
        "leaks": [dataclasses.asdict(leak) | {"says": str(leak)} for leak in leaks],
        "targets_in_prompts": {name: find_targets_in_prompts(split_rows) for name, split_rows in conversations.items()},
        "tier": data.tier,
    }
    return _redact(report, conversations) if is_red else report


def _redact(report: dict[str, Any], conversations: dict[str, list[Conversation]]) -> dict[str, Any]:
    """Redact the report of red data: answers become numbers, the most frequent one first; prompts are removed."""
    counts = Counter(c.answer for rows in conversations.values() for c in rows)
    numbers = {answer: f"answer {n}" for n, (answer, _) in enumerate(counts.most_common(), 1)}
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
    return list(_build(node | {"split": split, "packed": False}, tokenizer))


def _build(node: dict[str, Any], *arguments: Any) -> Any:
    """Build a component of a torchtune config without torchtune."""
    module, _, name = node["_component_"].rpartition(".")
    settings = {key: value for key, value in node.items() if key != "_component_"}
    return getattr(importlib.import_module(module), name)(*arguments, **settings)


def _find_unused_columns(data: DatasetConfig, first: Conversation, split: str) -> list[str]:
    """Return the columns that are in neither the prompt nor the answer."""
    if first.has_messages:
        return []
    columns = read_columns(data.path, split, data.format, data.split_column)
    used_columns = {data.column_map.get(name) or name for name in [*prompt_columns(data.prompt), "output"]}
    used_columns |= {"prompt", "completion"} if data.column_map["output"] not in columns else set()
    return [c for c in columns if c not in used_columns and c != data.split_column]


def _describe_row(example: Example, split: str, tokenizer: Any) -> dict[str, Any]:
    tokens = [
        {"text": text, "ids": ids, "target": example.labels[start] != IGNORE}
        for text, ids, start in _split_text(example.tokens, tokenizer)
    ]
    return {
        "split": split,
        "row": example.row,
        "length": len(example.tokens),
        "targets": sum(label != IGNORE for label in example.labels),
        "cut": example.cut,
        "tokens": tokens,
    }


def _split_text(ids: list[int], tokenizer: Any) -> list[tuple[str, list[int], int]]:
    """Return (text, token ids, index of the first): one token each, or several tokens that form a character."""
    pieces, text_before, start = [], "", 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=False)
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            continue
        pieces.append((text[len(text_before) :], ids[start:end], start))
        text_before, start = text, end
    return pieces


def _summarise(
    split: str, examples: list[Example], conversations: list[Conversation], config: RunConfig
) -> dict[str, Any]:
    lengths = sorted(len(e.tokens) for e in examples)
    answers = Counter(c.answer for c in conversations)
    summary = {
        "rows": len(examples),
        "tokens": {
            "shortest": lengths[0],
            "median": statistics.median_low(lengths),
            "95%": lengths[int(0.95 * (len(lengths) - 1))],
            "longest": lengths[-1],
        },
        "target_tokens": sum(label != IGNORE for e in examples for label in e.labels),
        "cut_rows": sum(e.cut > 0 for e in examples),
        "different_answers": len(answers),
        "answers": dict(answers.most_common(_MAX_ANSWERS)),
    }
    if config.dataset.packed and split == config.dataset.train_split:
        summary["packs"] = len(pack_sequences(examples, config.dataset.max_seq_len))
    return summary


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = Parser("data preview", "Show rows as the model sees them.", "print everything as JSON")
    parser.add_argument(
        "settings", metavar="SETTING", nargs="*", help="as for python -m cruijff_kit.train: dataset=files ..."
    )
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="rows to show token by token (default: 3)")
    parser.add_argument("--split", metavar="NAME", help="split of these rows (default: the training split)")
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with your own YAML")

    def command(options: argparse.Namespace) -> dict[str, Any]:
        from cruijff_kit.commands.data_preview_view import print_report
        from cruijff_kit.config.compose import compose

        config_dir = options.config_dir and str(Path(options.config_dir).expanduser())
        report = preview(compose(options.settings, config_dir), max(0, options.rows), options.split)
        if not options.json:
            print_report(report)
        return report

    return parser.run(argv, command)
