"""Arguments of the commands that show texts to models: folders, settings and texts."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cruijff_kit.commands.base import Parser
from cruijff_kit.models import download
from cruijff_kit.runs.model_source import ModelRef
from cruijff_kit.runs.texts import read_file_texts, read_split_texts, reject_long_texts, tokenise_texts
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.progress import say

if TYPE_CHECKING:
    from cruijff_kit.runs.texts import Text


def split_items(items: list[str], max_folders: int) -> tuple[list[Path], list[str]]:
    """Split positional arguments into folders and settings.

    Raises:
        UserError: more folders than `max_folders`.
    """
    folders = [i for i in items if "=" not in i or Path(i).is_dir()]
    if len(folders) > max_folders:
        some = f"{max_folders} folder{'s' * (max_folders > 1)}"
        raise UserError(f"{folders[max_folders]}: {some} can be named; settings are written key=value")
    return [Path(f) for f in folders], [i for i in items if i not in folders]


def read_texts(
    source: ModelRef, options: argparse.Namespace, answers: bool = False
) -> tuple[Any, list["Text"], int, int]:
    """The tokenizer, the texts that the options name, the model's context and its number of blocks.

    Args:
        answers: the model will read the rows' answers too.
    Raises:
        UserError: the model's folder or the texts are missing or malformed, or one is too long.
    """
    chosen = [name for name in ("text", "file", "split") if getattr(options, name)]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} are two ways to name texts; use one")
    if getattr(options, "column", None) and not options.file:
        raise UserError("--column names a column of --file; add --file FILE")
    if options.max_samples and chosen and chosen != ["split"]:
        raise UserError(f"--max-samples counts rows of a data set, not of --{chosen[0]}; leave it out")
    source.check_access(options.file)
    given = list(options.text or []) or (read_file_texts(options.file, options.column) if options.file else [])

    download.fetch(source.config.model)
    say("loading torch and torchtune")
    from cruijff_kit.models.base_model import build_on_meta
    from cruijff_kit.training import process_cache

    cfg = source.config.torchtune
    tokenizer = process_cache.get_tokenizer(cfg["tokenizer"])
    if given:
        texts = tokenise_texts(given, tokenizer)
    else:
        texts = read_split_texts(source.config, options.split, options.max_samples, tokenizer)
    decoder = build_on_meta(cfg["model"])
    reject_long_texts(texts, decoder.max_seq_len, source.config.model.name, answers)
    return tokenizer, texts, decoder.max_seq_len, len(decoder.layers)


def add_texts(parser: Parser) -> None:
    """The arguments that name texts."""
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text; repeat for more")
    parser.add_argument("--file", type=Path, metavar="FILE", help="texts: a .txt with one a line, or a table")
    parser.add_argument("--column", metavar="NAME", help="the column of --file; default: text, or the only one")
    parser.add_argument(
        "--split", metavar="NAME", help="the split whose prompts are the texts, as in evaluation; default: test"
    )
    parser.add_argument("--config-dir", metavar="DIR", help="folder with your own YAML")
    parser.add_argument("--batch-size", type=int, default=16, metavar="N", help="texts read at once (16)")


def join_layers(argv: list[str]) -> list[str]:
    """Turn `--layers -1,0` into `--layers=-1,0`, because argparse would take the list for a flag."""
    at = argv.index("--layers") if "--layers" in argv[:-1] else None
    return argv if at is None else [*argv[:at], f"--layers={argv[at + 1]}", *argv[at + 2 :]]
