"""Check whether a model is fine-tuned: `cruijff-kit compare A [B] [--text TEXT | --split NAME] [KEY=VALUE ...]`.

cruijff-kit compare RUN_DIR                                  the run's base model against its last adapter
cruijff-kit compare RUN_DIR --epoch 0                        against the adapter of an earlier epoch
cruijff-kit compare ADAPTER_DIR --text "A text."             an adapter that PEFT saved, on a text of your own
cruijff-kit compare RUN_DIR OTHER_RUN                        two runs of one base model against each other

It compares the perplexity of the answers of the test split (or of the texts), the logits of the next token after each
prompt (or text), and the most likely next token.
"""

import argparse
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cruijff_kit.commands.base import Parser, import_from_cwd
from cruijff_kit.commands.text_arguments import add_texts, read_texts, split_items
from cruijff_kit.models.adapter_files import is_adapter_folder
from cruijff_kit.runs.model_source import ModelRef, find_model, has_override, model_overrides
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.progress import progress, say

if TYPE_CHECKING:
    from cruijff_kit.models.model_difference import AdapterSize, ModelDifference
    from cruijff_kit.runs.texts import Text

_ROUNDING = 1e-6  # largest difference of logits that counts as rounding
_MAX_TEXTS = 200
_MACHINE_SETTINGS = ("device", "dtype", "threads", "gpus")


@dataclass(frozen=True)
class Pair:
    """Two models; if the command line names one, the first is its base model."""

    first: ModelRef
    second: ModelRef

    @property
    def has_base_model(self) -> bool:
        """Return whether the first model is the base model of the second."""
        return self.first.adapter is None


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Compare the two models of the command line; return the JSON output.

    Raises:
        UserError: a wrong option, no such model, or different base models.
    """
    for name in ("batch_size", "max_samples"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value} must be at least 1")
    pair = _find_pair(options)
    by_default = not (options.text or options.file or options.max_samples)
    options.max_samples = _MAX_TEXTS if by_default else options.max_samples
    tokenizer, texts, _, _ = read_texts(pair.second, options, answers=True)
    rows = _make_rows(texts)
    say(f"comparing {pair.first.summary()} with {pair.second.summary()} on {len(texts)} texts")
    from cruijff_kit.models import hidden_states
    from cruijff_kit.models.model_difference import measure_adapter, measure_difference

    second = hidden_states.open_model(pair.second.config.torchtune, pair.second.adapter, pair.second.is_peft)
    sizes = {"second": measure_adapter(second.decoder)}
    if pair.has_base_model:
        first = replace(second, is_base=True)
    else:  # both models share the base weights in memory
        first = hidden_states.open_model(pair.first.config.torchtune, pair.first.adapter, pair.first.is_peft)
        sizes["first"] = measure_adapter(first.decoder)
    with progress("comparing", len(rows)) as bar:
        difference = measure_difference(
            first, second, rows, tokenizer.pad_id, options.batch_size, advance=lambda done: bar.advance(steps=done)
        )
    report = _make_report(pair, difference, sizes)
    _print_report(report)
    return report


def _find_pair(options: argparse.Namespace) -> Pair:
    places, settings = split_items(options.items, 2)
    machine = [s for s in settings if s.lstrip("+").partition("=")[0] in _MACHINE_SETTINGS]
    runs = [(p / "result.json").is_file() or (p / "config.yaml").is_file() for p in places]
    # If there is an adapter or a model, settings other than the machine's are for it, not for a run.
    run_settings = machine if not all(runs) else settings
    if len(places) < 2:
        place, is_run = (places[0], runs[0]) if places else (None, False)
        second = find_model(place, run_settings if is_run else settings, options.config_dir, options.epoch)
        if second.adapter is None:
            name = place or second.config.model.name
            raise UserError(f"{name} is a base model without an adapter; name a run's or an adapter's folder")
        return Pair(replace(second, adapter=None, epoch=None), second)
    sources: list[ModelRef] = []
    for place, is_run in zip(places, runs, strict=True):
        source_settings = run_settings if is_run else [*settings, *_base_model_overrides(place, settings, sources)]
        sources.append(find_model(place, source_settings, options.config_dir, options.epoch if is_run else None))
    _refuse_different_bases(*sources)
    return Pair(*sorted(sources, key=lambda s: s.adapter is not None))  # a base model comes first


def _base_model_overrides(place: Path, settings: list[str], sources: list[ModelRef]) -> list[str]:
    """Return overrides for the first model's base model, if the adapter's own base model is not a local folder."""
    if not sources or has_override(settings, "model") or not is_adapter_folder(place):
        return []
    from cruijff_kit.models.external_adapter import base_model_name

    model = sources[0].config.model
    is_local = Path(base_model_name(place) or "/nowhere").expanduser().is_dir()
    return [] if is_local else [*model_overrides(Path(model.path), settings), f"model.kind={model.kind}"]


def _refuse_different_bases(first: ModelRef, second: ModelRef) -> None:
    from cruijff_kit.models.fingerprint import fingerprint

    first_path, second_path = (Path(s.config.model.path).expanduser().resolve() for s in (first, second))
    if first_path != second_path and (
        not first_path.is_dir() or not second_path.is_dir() or fingerprint(first_path) != fingerprint(second_path)
    ):
        raise UserError(
            f"the base models differ ({first_path}, {second_path}), so logits cannot be compared; take two adapters of one "
            "base model"
        )


def _make_rows(texts: list["Text"]) -> list[Any]:
    from cruijff_kit.models.model_difference import ScoredText

    rows = []
    for t in texts:
        if t.answer:
            rows.append(ScoredText([*t.ids, *t.answer], len(t.ids), len(t.ids) - 1))
        else:  # a text without an answer: all tokens except the first
            rows.append(ScoredText(t.ids, 1, len(t.ids) - 1))
    return rows


def _make_report(pair: Pair, difference: "ModelDifference", sizes: dict[str, "AdapterSize"]) -> dict[str, Any]:
    perplexity, differs = difference.perplexity, difference.max_abs > _ROUNDING
    report: dict[str, Any] = {
        "base_model": pair.second.config.model.path,
        "first": {"name": pair.first.summary(), "adapter": pair.first.adapter_path, "perplexity": perplexity[0]},
        "second": {"name": pair.second.summary(), "adapter": pair.second.adapter_path, "perplexity": perplexity[1]},
        "texts": difference.num_texts,
        "scored_tokens": difference.num_scored,
        "logits": {"mean_abs": difference.mean_abs, "max_abs": difference.max_abs},
        "kl": difference.kl,
        "top1_agreement": difference.top1_agreement,
        "differs": differs,
        "fine_tuned": differs if pair.has_base_model else None,
    }
    for name, size in sizes.items():
        report[name] |= {"update": asdict(size)}
    return report | {"verdict": _describe_verdict(pair, report, sizes["second"])}


def _describe_verdict(pair: Pair, report: dict[str, Any], size: "AdapterSize") -> str:
    before, after = report["first"]["perplexity"], report["second"]["perplexity"]
    perplexity = "" if before is None or after is None else f"perplexity {before:.4g} -> {after:.4g}, "
    change = (
        f"{perplexity}logits differ by {report['logits']['mean_abs']:.3g} on average, the most likely next token agrees on "
        f"{report['top1_agreement']:.1%} of {report['texts']} texts"
    )
    if not pair.has_base_model:
        return f"different: {change}" if report["differs"] else "the same: no logit differs on these texts"
    if report["differs"]:
        return f"fine-tuned: {change}"
    reason = "every B is zero" if not size.nonzero else "no logit differs on these texts"
    return f"not: the adapter changes nothing ({reason})"


def _print_report(report: dict[str, Any]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for title in ("", "first", "second"):
        table.add_column(title, overflow="fold")
    first, second = report["first"], report["second"]
    table.add_row("model", first["name"], second["name"])
    table.add_row(
        "perplexity", *("-" if m["perplexity"] is None else f"{m['perplexity']:.4g}" for m in (first, second))
    )
    sizes = (m.get("update") for m in (first, second))
    norms = (f"{u['norm']:.4g} ({u['nonzero']} of {u['modules']} modules)" if u else "none" for u in sizes)
    table.add_row("norm of the adapter's update", *norms)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    console.print(table)
    logits = report["logits"]
    print(
        f"logits of the next token: differ by {logits['mean_abs']:.4g} on average, by {logits['max_abs']:.4g} at most"
    )
    print(f"KL(second || first): {report['kl']:.4g} nats; most likely token agrees on {report['top1_agreement']:.1%}")
    print(report["verdict"])


def main(argv: list[str] | None = None) -> int:
    """Run the command; return the exit code."""
    parser = Parser("compare", "Measure how far a model is fine-tuned: base against adapter, or two adapters.")
    parser.add_examples(__doc__)
    parser.add_argument("items", metavar="A [B] | KEY=VALUE", nargs="+", help="runs or adapters; settings")
    parser.add_argument(
        "--epoch", type=int, metavar="N", help="epoch of a run's adapter, from 0; default: the last one saved"
    )
    add_texts(parser)
    parser.add_argument("--max-samples", type=int, metavar="N", help=f"the first N rows of the split ({_MAX_TEXTS})")
    import_from_cwd()
    return parser.run(argv, compare)


if __name__ == "__main__":
    raise SystemExit(main())
