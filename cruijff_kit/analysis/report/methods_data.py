"""What the methods text says of the data and of the prompts. Called by methods."""

from cruijff_kit.analysis.report.document import listed
from cruijff_kit.analysis.report.load import Runs
from cruijff_kit.analysis.report.phrases import each, either, setting, worded

_LONGEST = 400  # letters of a prompt that are quoted
_KINDS = {"exact": "repeated prompts", "near": "nearly repeated prompts", "unit": "rows of the same unit"}
_LEAKS = {
    "exact": "repeat prompts of the {0} split",
    "near": "nearly repeat prompts of the {0} split",
    "unit": "belong to units of the {0} split",
}


def data_text(runs: Runs) -> str:
    """The data set, what was used of it, and what stood in two splits."""
    names = each(runs.with_result, lambda r: r.result.settings.get("dataset"))
    if not names:
        return ""
    drawn = each(runs.all, lambda r: setting(r, "dataset.arguments") or None)
    text = f"The data set was {listed([str(n) for n in names])}"
    if drawn and any(each(runs.all, lambda r: setting(r, "dataset.generator"))):
        keys = dict.fromkeys(k for arguments in drawn for k in arguments)
        words = []
        for key in keys:
            values = each(runs.all, lambda r, k=key: (setting(r, "dataset.arguments") or {}).get(k))  # type: ignore[misc]
            words.append(f"{key} {worded(values)}")
        text += f", drawn by its generator ({', '.join(words)})"
    sizes = []
    for split in ("train", "validation"):
        rows = each(runs.with_result, lambda r, split=split: r.result.rows.get(split) or None)  # type: ignore[misc]
        sizes += [f"{worded(rows)} {'training' if split == 'train' else split} rows"] if rows else []
    text += f", of which we used {listed(sizes)}" if sizes else ""
    hashes = each(runs.with_result, lambda r: r.result.data_hash)
    text += (
        f" (data hash {worded(hashes)})" if len(hashes) <= 3 and hashes else f" ({len(hashes)} versions of the data)"
    )
    length = each(runs.all, lambda r: either(r, "dataset.max_seq_len", "torchtune.tokenizer.max_seq_len"))
    text += f". Rows were cut at {worded(length)} tokens" if length else ""
    whole = each(runs.all, lambda r: either(r, "dataset.train_on_input", "torchtune.dataset.train_on_input"))
    text += ", and the loss was cross-entropy over the outputs' tokens alone" if whole == [False] else ""
    packed = True in each(runs.all, lambda r: either(r, "dataset.packed", "torchtune.dataset.packed"))
    return f"{text}{'; short rows were packed together' if packed else ''}. {_leaks(runs)}".rstrip()


def _leaks(runs: Runs) -> str:
    """What stood in two splits, what of it was let pass, and where nothing did."""
    checked = [r for r in runs.with_result if r.done]
    if not checked:
        return ""
    found: dict[str, list[int]] = {}
    for run in checked:
        for what, rows in run.result.leaks.items():
            found.setdefault(what, []).append(rows)
    sentences = [_leak(what, sorted({*rows})) for what, rows in found.items()]
    kinds = [kind for kind in ("exact", "near", "unit") if any(what.startswith(kind) for what in found)]
    allowed = {kind for run in checked for kind in run.result.allowed_leaks}
    if meant := [_KINDS[kind] for kind in kinds if kind in allowed]:
        sentences.append(f"We allowed {listed(meant)} across splits on purpose.")
    if "exact" not in kinds:
        sentences.append("No prompt occurred in two splits (compared without case, blanks and final punctuation).")
    for run in checked:
        if setting(run, "dataset.validation_split") == (setting(run, "dataset.train_split") or "train"):
            sentences.append("The validation loss was measured on the training rows themselves.")
            break
    units = each(checked, lambda r: r.result.unit_column)
    sentences += [f"The column that names the unit of each row is {listed(units)}."] if units else []
    return " ".join(sentences)


def _leak(what: str, rows: list[int]) -> str:
    kind, first, *second = what.split(" ", 2)
    if not second:  # "target train"
        return f"In {worded(rows)} rows of the {first} split the prompt contains the answer."
    return f"Of the {second[0]} split {worded(rows)} {'row' if rows == [1] else 'rows'} {_LEAKS[kind].format(first)}."


def prompt_text(runs: Runs) -> str:
    """What the model is asked with: prompt, system prompt, and how they are put."""
    trained = [r for r in runs.with_result if r.result.training]
    templates = each([r for r in trained if not r.result.conversations], lambda r: setting(r, "dataset.prompt"))
    ways = [f"put as {listed([_quoted(t) for t in templates], 'or')}"] if templates else []
    columns = each(trained, lambda r: (setting(r, "dataset.column_map") or {}).get("input"))
    if ways and columns and columns != ["input"]:
        ways[0] += f" ({{input}} stands for the column {listed(columns)})"
    if any(r.result.conversations for r in trained):
        ways.append("a conversation, used unchanged")
    if not ways:
        return ""
    system = each(trained, lambda r: setting(r, "dataset.system_prompt"))
    message = (
        f"with the system message {listed([_quoted(s) for s in system], 'or')}"
        if system
        else "without a system message"
    )
    kinds = each(trained, lambda r: setting(r, "model.kind"))
    how = {"chat": "in the model's own chat template", "base": "as plain text, the answer followed by the end token"}
    said = [
        f"Each row was {' or '.join(ways)}",
        message,
        *([listed([how[k] for k in kinds if k in how], "or")] if kinds else []),
    ]
    same = sorted({e.task for r in trained for e in r.result.evaluation if e.prompts_checked})
    return f"{', '.join(said)}." + (
        f" Evaluation by {listed(same)} used the same prompt tokens as training." if same else ""
    )


def _quoted(text: str) -> str:
    """A prompt between quotation marks, line breaks as \\n; of a long one the beginning."""
    shown = text.replace("\\", "\\\\").replace("\n", "\\n").replace("\t", "\\t")
    if len(shown) > _LONGEST:
        return f'"{shown[:_LONGEST]}..." ({len(text)} letters; the full text is in config.yaml)'
    return f'"{shown}"'
