"""Checks before training that scorers can take a task's targets, and that answers are long enough for them."""

from typing import Any

from inspect_ai import Task
from inspect_ai.dataset import Sample

from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.task_names import TaskName
from cruijff_kit.evaluation.build_tasks import option_tokens
from cruijff_kit.evaluation.chance import targets_of
from cruijff_kit.evaluation.external_tasks import needs_whole_answer
from cruijff_kit.evaluation.generate_config import as_messages
from cruijff_kit.evaluation.scorers import INCLUSION
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import quote

_MARGIN = 4  # tokens that a text may have beyond its bytes: the end token, a space that a tokenizer writes in front
_LONGEST = 8  # targets whose tokens are counted as training has them
_SHORTEST = 200  # targets that are looked for in the others
_BETWEEN = "\0"


def most_tokens(task: Task, config: RunConfig) -> int:
    """Return the tokens of the longest answer."""
    return task.config.max_tokens or config.eval.max_tokens


def check_targets(name: TaskName, task: Task, config: RunConfig) -> None:
    """Refuse a target that a scorer of a task that ships cannot take.

    Raises:
        UserError: its row is named.
    """
    checks = [s.check_target for s in task.scorer or [] if hasattr(s, "check_target")]
    for sample in task.dataset[: config.eval.limit]:
        try:
            for check in checks:
                check(sample.target)
        except UserError as error:
            raise UserError(f"eval task {name} cannot run: {error} (row {sample.metadata['row']})") from error


def check_room(name: TaskName, task: Task, config: RunConfig, tokenizer: Any) -> tuple[str, ...]:
    """Refuse a target that is longer than any answer, where a scorer needs the whole answer.

    Only targets of more bytes than an answer has tokens are tokenised.

    Returns:
        A line where the longest target fits, but not its end token.
    Raises:
        UserError: a target (of a sample with several, the shortest) has more tokens than an answer may have.
    """
    limit = most_tokens(task, config)
    if option_tokens(task) or not any(needs_whole_answer(s) for s in task.scorer or []):
        return ()  # options are one token each, which the request of their logits checks
    long: dict[str, tuple[int, Sample]] = {}
    for number, sample in enumerate(task.dataset[: config.eval.limit], 1):
        target = sample.target if isinstance(sample.target, str) else min(sample.target, key=len)
        if len(target.encode()) + _MARGIN > limit:
            long.setdefault(target, (number, sample))
    likely = sorted(long, key=lambda target: len(tokenizer.encode(target)))[-_LONGEST:]
    lengths = [(_count_tokens(target, long[target][1], tokenizer, name.ships), target) for target in likely]
    needed, target = max(lengths, default=(0, ""))
    if needed <= limit:
        return ()
    number, sample = long[target]
    where = f"row {sample.metadata['row']}" if name.ships else f"sample {number}"
    setting, place = ("max_tokens", " in its GenerateConfig") if task.config.max_tokens else ("eval.max_tokens", "")
    longest = f"{setting}={limit}: the longest target of task {name.label} has {needed} tokens ({where})"
    mend = f"set {setting}={needed}{place}"
    if needed - 1 > limit:
        raise UserError(f"{longest}; {mend}")
    return (f"{longest}, the last of them its end, so that a longer answer counts as right; {mend}",)


def _count_tokens(target: str, sample: Sample, tokenizer: Any, is_trained: bool) -> int:
    """Count the tokens of a target with its end token; as training has it, where it is trained."""
    if not is_trained:
        return len(tokenizer.encode(target.strip())) + 1
    ids, prompt = tokenizer.encode_example(as_messages(sample.input), target)
    return len(ids) - prompt


def targets_within_others(name: TaskName, task: Task) -> tuple[str, ...]:
    """Warn in a line where `includes` cannot tell targets apart, because one contains another."""
    if not any(getattr(s, "compares", None) == INCLUSION for s in task.scorer or []):
        return ()
    targets = sorted(targets_of(task), key=lambda t: (len(t), t))
    whole = _BETWEEN.join(targets)
    within = next((t for t in targets[:_SHORTEST] if whole.find(t, whole.find(t) + 1) >= 0), None)
    if within is None:
        return ()
    holder = next(t for t in targets if within in t and t != within)
    return (
        f"includes cannot tell all targets of task {name.label} apart: {quote(within)} also stands in {quote(holder)}; "
        "use match",
    )
