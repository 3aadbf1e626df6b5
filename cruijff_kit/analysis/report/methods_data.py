"""The sentences of the methods text about the data and the prompts. Called by methods."""

from collections.abc import Callable
from typing import Any

from cruijff_kit.analysis.report.document import join_words
from cruijff_kit.analysis.report.load import ReportRun, Runs
from cruijff_kit.analysis.report.phrases import distinct_values, format_values, read_first_setting, read_setting

_MAX_CHARACTERS = 400  # of a prompt that is quoted
_KINDS = {"exact": "repeated prompts", "near": "nearly repeated prompts", "unit": "rows of the same unit"}
_LEAKS = {
    "exact": "repeat prompts of the {0} split",
    "near": "nearly repeat prompts of the {0} split",
    "unit": "belong to units of the {0} split",
}


def describe_data(runs: Runs) -> str:
    """Describe the data set, the rows that were used, and repetitions across splits."""
    names = distinct_values(runs.runs_with_results, lambda r: r.result.settings.get("dataset"))
    if not names:
        return ""
    arguments = distinct_values(runs.all_runs, lambda r: read_setting(r, "dataset.arguments") or None)
    text = f"The data set was {join_words([str(n) for n in names])}"
    if arguments and any(distinct_values(runs.all_runs, lambda r: read_setting(r, "dataset.generator"))):
        settings = []
        for key in dict.fromkeys(k for mapping in arguments for k in mapping):
            values = distinct_values(runs.all_runs, _argument_reader(key))
            settings.append(f"{key} {format_values(values)}")
        text += f", produced by its generator ({', '.join(settings)})"
    sizes = []
    for split in ("train", "validation"):
        rows = distinct_values(runs.runs_with_results, lambda r, split=split: r.result.rows.get(split) or None)  # type: ignore[misc]
        sizes += [f"{format_values(rows)} {'training' if split == 'train' else split} rows"] if rows else []
    text += f", of which we used {join_words(sizes)}" if sizes else ""
    hashes = distinct_values(runs.runs_with_results, lambda r: r.result.data_hash)
    is_short = 0 < len(hashes) <= 3
    text += f" (data hash {format_values(hashes)})" if is_short else f" ({len(hashes)} versions of the data)"
    length = distinct_values(
        runs.all_runs, lambda r: read_first_setting(r, "dataset.max_seq_len", "torchtune.tokenizer.max_seq_len")
    )
    text += f". Rows were truncated at {format_values(length)} tokens" if length else ""
    train_on_input = distinct_values(
        runs.all_runs, lambda r: read_first_setting(r, "dataset.train_on_input", "torchtune.dataset.train_on_input")
    )
    text += ", and the loss was the cross-entropy over the output tokens only" if train_on_input == [False] else ""
    is_packed = True in distinct_values(
        runs.all_runs, lambda r: read_first_setting(r, "dataset.packed", "torchtune.dataset.packed")
    )
    return f"{text}{'; short rows were packed into sequences' if is_packed else ''}. {_describe_leaks(runs)}".rstrip()


def _argument_reader(key: str) -> Callable[[ReportRun], Any]:
    return lambda run: (read_setting(run, "dataset.arguments") or {}).get(key)


def _describe_leaks(runs: Runs) -> str:
    """Describe repetitions across splits, which of them were allowed, and the unit column."""
    done_runs = [r for r in runs.runs_with_results if r.is_done]
    if not done_runs:
        return ""
    rows_by_leak: dict[str, list[int]] = {}
    for run in done_runs:
        for leak, rows in run.result.leaks.items():
            rows_by_leak.setdefault(leak, []).append(rows)
    sentences = [_describe_leak(leak, sorted({*rows})) for leak, rows in rows_by_leak.items()]
    kinds = [kind for kind in ("exact", "near", "unit") if any(leak.startswith(kind) for leak in rows_by_leak)]
    allowed = {kind for run in done_runs for kind in run.result.allowed_leaks}
    if intended := [_KINDS[kind] for kind in kinds if kind in allowed]:
        sentences.append(f"We deliberately allowed {join_words(intended)} across splits.")
    if "exact" not in kinds:
        sentences.append("No prompt occurred in two splits (ignoring case, blanks and final punctuation).")
    for run in done_runs:
        if read_setting(run, "dataset.validation_split") == (read_setting(run, "dataset.train_split") or "train"):
            sentences.append("The validation loss was measured on the training rows themselves.")
            break
    units = distinct_values(done_runs, lambda r: r.result.unit_column)
    sentences += [f"The column {join_words(units)} names the unit of each row."] if units else []
    return " ".join(sentences)


def _describe_leak(leak: str, rows: list[int]) -> str:
    kind, first, *second = leak.split(" ", 2)
    noun = "row" if rows == [1] else "rows"
    if not second:  # "target train"
        return f"In {format_values(rows)} {noun} of the {first} split, the prompt contains the answer."
    return f"In the {second[0]} split, {format_values(rows)} {noun} {_LEAKS[kind].format(first)}."


def describe_prompts(runs: Runs) -> str:
    """Describe the prompt, the system message and the chat format."""
    trained_runs = [r for r in runs.runs_with_results if r.result.training]
    templates = distinct_values(
        [r for r in trained_runs if not r.result.conversations], lambda r: read_setting(r, "dataset.prompt")
    )
    formats = [f"formatted as {join_words([_quote(t) for t in templates], 'or')}"] if templates else []
    columns = distinct_values(trained_runs, lambda r: (read_setting(r, "dataset.column_map") or {}).get("input"))
    if formats and columns and columns != ["input"]:
        formats[0] += f" ({{input}} stands for the column {join_words(columns)})"
    if any(r.result.conversations for r in trained_runs):
        formats.append("an unchanged conversation")
    if not formats:
        return ""
    system = distinct_values(trained_runs, lambda r: read_setting(r, "dataset.system_prompt"))
    message = (
        f"with the system message {join_words([_quote(s) for s in system], 'or')}"
        if system
        else "without a system message"
    )
    kinds = distinct_values(trained_runs, lambda r: read_setting(r, "model.kind"))
    format_by_kind = {
        "chat": "in the model's own chat template",
        "base": "as plain text with an end token after the answer",
    }
    parts = [
        f"Each row was {' or '.join(formats)}",
        message,
        *([join_words([format_by_kind[k] for k in kinds if k in format_by_kind], "or")] if kinds else []),
    ]
    tasks = sorted({e.task for r in trained_runs for e in r.result.evaluation if e.prompts_checked})
    return f"{', '.join(parts)}." + (
        f" Evaluation by {join_words(tasks)} used the same prompt tokens as training." if tasks else ""
    )


def _quote(text: str) -> str:
    """Quote a prompt, with line breaks as \\n; only the beginning of a long one."""
    escaped = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    if len(escaped) > _MAX_CHARACTERS:
        return f'"{escaped[:_MAX_CHARACTERS]}..." ({len(text)} characters; the full text is in config.yaml)'
    return f'"{escaped}"'
