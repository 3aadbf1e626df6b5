"""Write embeddings and logits of texts: `cruijff-kit embed MODEL --to FILE [KEY=VALUE ...]`.

cruijff-kit embed RUN_DIR --to test.parquet                                       the run's test split, its last adapter
cruijff-kit embed RUN_DIR --base-model --split validation --to v.h5                its base model
cruijff-kit embed ADAPTER_DIR --text "One." --text "Two." --to e.h5               an adapter that PEFT saved
cruijff-kit embed model=smollm2_135m --file my.csv --column said --layers 0,6,-1 --pooling mean --to e.h5
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cruijff_kit.commands.base import Parser, import_from_cwd
from cruijff_kit.commands.text_arguments import add_texts, join_layers, read_texts, split_items
from cruijff_kit.data.tiers import RED
from cruijff_kit.models.embedding_file import EmbeddingTable, check_target, write_table
from cruijff_kit.models.pooling import NO_POOLING, POOLINGS
from cruijff_kit.runs.model_source import find_model
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.progress import progress, say

if TYPE_CHECKING:
    from cruijff_kit.runs.texts import Text

_MAX_PRINTED = 20  # texts whose next tokens are printed


def embed(options: argparse.Namespace) -> dict[str, Any]:
    """Write the embeddings of the texts of the command line; return the JSON output.

    Raises:
        UserError: a wrong option, no such model or text, or red data with --top. Nothing was written.
    """
    check_target(options.to, options.force)
    numbers = _parse_numbers(options.layers)
    for name in ("batch_size", "max_samples", "top"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    paths, overrides = split_items(options.items, 1)
    source = find_model(paths[0] if paths else None, overrides, options.config_dir, options.epoch, options.base_model)
    is_red = source.check_access(options.file) == RED
    if is_red and options.top:
        raise UserError("--top writes next tokens of the model, and the data is red; drop --top")
    tokenizer, texts, context, blocks = read_texts(source, options)
    layers = _select_layers(numbers, blocks)
    from cruijff_kit.models import hidden_states

    say(f"reading {source.summary()}")
    model = hidden_states.open_model(source.config.torchtune, source.adapter, source.is_peft)
    with progress("reading texts", len(texts)) as bar:
        states = hidden_states.read_states(
            model, [t.ids for t in texts], layers, options.pooling, pad_id=tokenizer.pad_id,
            batch_size=options.batch_size, logits=options.logits, top=options.top or 0,
            advance=lambda done: bar.advance(steps=done),
        )  # fmt: skip
    next_tokens = states.top and [[(_spell_token(n, tokenizer), share) for n, share in row] for row in states.top]
    identity = {"model": source.config.model.path, "adapter": source.adapter_path}
    shown_texts = None if is_red else [t.shown for t in texts]
    write_table(
        EmbeddingTable(states, [t.id for t in texts], shown_texts, layers, options.pooling, next_tokens, identity),
        options.to,
    )
    report = identity | {
        "file": str(options.to.absolute()), "texts": len(texts), "tokens": sum(len(t.ids) for t in texts),
        "shape": list(states.tensor.shape), "layers": layers, "pooling": options.pooling,
        "dtype": str(model.machine.dtype).removeprefix("torch."), "context": context,
    }  # fmt: skip
    if next_tokens:
        report["next_tokens"] = [
            {"id": t.id, "top": [list(p) for p in row]} for t, row in zip(texts, next_tokens, strict=True)
        ]
    _print_report(report, texts, next_tokens)
    return report


def _spell_token(token: int, tokenizer: Any) -> str:
    """Return a token as text; a part of a character in the spelling of the vocabulary."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    return text if text and "\ufffd" not in text else tokenizer.id_to_token(token)


def _print_report(report: dict[str, Any], texts: list["Text"], tops: list[list[tuple[str, float]]] | None) -> None:
    for t, row in list(zip(texts, tops or [], strict=False))[:_MAX_PRINTED]:
        print(f"{t.id}: {' '.join(t.shown.split())[-60:]!r} -> " + ", ".join(f"{k!r} {p:.3f}" for k, p in row))
    layers = ", ".join(map(str, report["layers"]))
    print(
        f"{report['texts']} texts, layers {layers}, pooling {report['pooling']}, {report['shape']} -> {report['file']}"
    )


def _parse_numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--layers {text} is not a list of whole numbers; write for example 0,6,-1") from None


def _select_layers(numbers: list[int], blocks: int) -> list[int]:
    """Return layers from 0 (the embedding) to the number of blocks; negative numbers count from the end."""
    for n in numbers:
        if not -blocks - 1 <= n <= blocks:
            raise UserError(
                f"--layers {n} does not exist; this model has 0 (the embedding) to {blocks}, or from the end -1 to "
                f"{-blocks - 1}"
            )
    layers = [n if n >= 0 else blocks + 1 + n for n in numbers]
    if len({*layers}) < len(layers):
        raise UserError(f"--layers names a layer twice: {', '.join(map(str, layers))}; name each once")
    return layers


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = Parser("embed", "Embeddings and logits of texts, by a base model or with an adapter.")
    parser.add_examples(__doc__)
    parser.add_argument("items", metavar="MODEL | KEY=VALUE", nargs="+", help="a run, an adapter, a model; settings")
    parser.add_argument("--to", type=Path, required=True, metavar="FILE", help="file to write: .h5, .hdf5 or .parquet")
    parser.add_argument(
        "--epoch", type=int, metavar="N", help="epoch of a run's adapter, from 0; default: the last one saved"
    )
    parser.add_argument("--base-model", action="store_true", help="the base model alone")
    add_texts(parser)
    parser.add_argument("--max-samples", type=int, metavar="N", help="the first N rows of the split")
    parser.add_argument("--layers", default="-1", metavar="N,N", help="0: the embedding; -1: the last one (default)")
    poolings = (*POOLINGS, NO_POOLING)
    parser.add_argument(
        "--pooling", choices=poolings, default="last_non_padding", help="pooling over positions; none: each position"
    )
    parser.add_argument("--logits", action="store_true", help="also the logits after each text")
    parser.add_argument("--top", type=int, metavar="N", help="also the N most likely next tokens with probabilities")
    parser.add_argument("--force", action="store_true", help="overwrite an existing file")
    import_from_cwd()
    return parser.run(join_layers(sys.argv[1:] if argv is None else list(argv)), embed)


if __name__ == "__main__":
    raise SystemExit(main())
