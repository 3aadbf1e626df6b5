"""Scorers of answers: a text, an option, a number.

    from cruijff_kit.evaluation.scorers import exact, risk_scorer
    Task(..., scorer=[exact(), risk_scorer(("0", "1"))], config=GenerateConfig(logprobs=True, top_logprobs=20))

They work in any inspect-ai task and with any model. A sample that cannot be scored has the value "N", the reason, and
metadata["scored"] = False; see `metrics` for how it counts.

Other modules read a scorer's attributes: needs_whole_answer, compares (texts: EQUALITY or INCLUSION),
options, option_tokens (options whose logits it reads), decimal_comma, and check_target, which raises UserError for a text
that cannot be a target.
"""

import functools
import math
import unicodedata
from collections.abc import Sequence
from typing import Any

from inspect_ai.model import Logprob, get_model
from inspect_ai.scorer import (
    CORRECT,
    INCORRECT,
    NOANSWER,
    Score,
    Scorer,
    Target,
    accuracy,
    scorer,
    stderr,
)
from inspect_ai.solver import TaskState

from cruijff_kit.evaluation import metrics
from cruijff_kit.evaluation.numbers import find_number, find_risk
from cruijff_kit.util import redaction
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.redaction import quote

OPTION_LOGITS = "option_logits"
"""Key in the metadata of the in-memory model's outputs: option -> the logit of its token at the answer's beginning."""
OPTION_SAID = "option_said"
"""Key beside it: the option that the answer begins with; None: with none."""

EQUALITY, INCLUSION = "equality", "inclusion"
_TEXTS = [accuracy(), stderr()]
_OPTIONS = [metrics.accuracy(), metrics.stderr(), metrics.balanced_accuracy(), metrics.f1(), metrics.confusion()]
_RISKS = [metrics.auc(), metrics.brier(), metrics.c_ece(), metrics.r_ece()]
_NUMBERS = [metrics.mae(), metrics.rmse(), metrics.r_squared(), metrics.parse_rate()]


# inspect-ai's `match` and `includes` have other parameters, so that `inspect score`, which looks for them by these names,
# refuses instead of scoring otherwise.
@scorer(metrics=_TEXTS, name="match")
def exact(case_sensitive: bool = True) -> Scorer:
    """Score whether the answer equals the target, or one of the targets, character by character (after `plain`).

    Unlike inspect-ai's match(location="exact"), which strips punctuation: there "5" passes for "-5" and "C" for "C++".
    """
    return _text_scorer(EQUALITY, case_sensitive)


@scorer(metrics=_TEXTS)
def includes(case_sensitive: bool = True) -> Scorer:
    """Score whether the answer contains the target, or one of the targets (both after `plain`)."""
    return _text_scorer(INCLUSION, case_sensitive)


def plain(text: str) -> str:
    """Normalise a text for comparison: Unicode's composed form (NFC), without blanks around it; its case stays."""
    return unicodedata.normalize("NFC", text).strip()


def _text_scorer(compares: str, case_sensitive: bool) -> Scorer:
    def fold(text: str) -> str:
        return plain(text) if case_sensitive else plain(text).casefold()

    def is_right(answer: str, wanted: str) -> bool:
        return wanted in answer if compares == INCLUSION else wanted == answer

    async def score(state: TaskState, target: Target) -> Score:
        text = state.output.completion
        right = any(is_right(fold(text), fold(wanted)) for wanted in target)
        reason = None if text.strip() else "no_response"
        return Score(value=CORRECT if right else INCORRECT, answer=text.strip(), explanation=text, reason=reason)

    score.compares, score.needs_whole_answer = compares, True
    return score


@scorer(metrics=[*_OPTIONS, *_RISKS, metrics.coverage()])
def risk_scorer(option_tokens: Sequence[str] = ("0", "1")) -> Scorer:
    """Probabilities of the options as the first token of the answer; risk = P(last option).

    They are the softmax of the tokens' logits. The model in memory gives the logits of exactly these tokens, as training
    has them behind this prompt, in fp32. For other models the task must request log-probabilities with alternatives: tokens
    are compared by spelling, and a sample where an option is missing is not scored.
    log_odds: of the last option against all others, before it is rounded into a probability.

    Args:
        option_tokens: two or more texts, each a single token; targets are among them.
    Raises:
        UserError: an option is not a single token, the log has no log-probabilities, or a target is no option.
    """
    options = _check_options(option_tokens)

    async def score(state: TaskState, target: Target) -> Score:
        label = _find_label(target.text, options)
        logits, answer = await _read_logits(state, options) or (None, None)
        if logits is None:
            first = _first_token(state)
            if first is None:
                return _make_no_answer_score("no_response", "nothing was generated", label=label, positive=options[-1])
            by_spelling = {
                _spelling(t.token): t.logprob for t in [*first.top_logprobs, first] if math.isfinite(t.logprob)
            }
            if missing := [o for o in options if o not in by_spelling]:
                why = f"not among the {len(by_spelling)} likeliest tokens: {', '.join(missing)}"
                return _make_no_answer_score("missing_option", why, label=label, positive=options[-1])
            logits, answer = [by_spelling[o] for o in options], _spelling(first.token)
        score = _risk_score(_softmax(logits), options, label, answer)
        score.metadata["log_odds"] = logits[-1] - _logsumexp(logits[:-1])
        return score

    score.options = score.option_tokens = tuple(options)
    score.check_target = functools.partial(_find_label, options=options)
    return score


@scorer(metrics=[*_OPTIONS, *_RISKS, metrics.parse_rate()])
def numeric_risk_scorer(options: Sequence[str] = ("0", "1"), threshold: float = 0.5) -> Scorer:
    """Score the risk that the answer's text gives as a number in [0, 1] (`numbers.find_risk`); "80%" is 0.8.

    Args:
        options: the two labels; the risk is that of the last.
        threshold: from this risk on the last option counts as predicted.
    Raises:
        UserError: a target is no option.
    """
    options = _check_options(options)
    if len(options) != 2:
        raise UserError(f"numeric_risk_scorer takes two options, not {len(options)}")

    async def score(state: TaskState, target: Target) -> Score:
        label = _find_label(target.text, options)
        risk = find_risk(state.output.completion)
        if risk is None:
            why = "no number in [0, 1] in the answer, or several"
            return _make_no_answer_score("invalid_response_format", why, label=label, positive=options[-1])
        predicted = options[risk >= threshold]
        return _risk_score([1 - risk, risk], options, label, predicted, predicted)

    score.options, score.check_target = tuple(options), functools.partial(_find_label, options=options)
    return score


@scorer(metrics=[*_OPTIONS, metrics.coverage()])
def binary_scorer(options: Sequence[str] = ("0", "1")) -> Scorer:
    """Score which option the answer's text is; any other text is wrong ("other" in the confusion).

    Args:
        options: two or more texts; the last is the positive class; targets are among them.
    Raises:
        UserError: a target is no option.
    """
    options = _check_options(options)

    async def score(state: TaskState, target: Target) -> Score:
        label, text = _find_label(target.text, options), plain(state.output.completion)
        predicted = next((o for o in options if plain(o) == text), "other")
        metadata = {"scored": True, "label": label, "predicted": predicted, "positive": options[-1], "said": predicted}
        return Score(value=CORRECT if predicted == label else INCORRECT, answer=text, metadata=metadata)

    score.options, score.needs_whole_answer = tuple(options), True
    score.check_target = functools.partial(_find_label, options=options)
    return score


@scorer(metrics=_NUMBERS)
def continuous_scorer(decimal_comma: bool = False) -> Scorer:
    """Score the number in the answer's text (`numbers.find_number`). Value: |difference| from the target's.

    Args:
        decimal_comma: as targets and answers are written: "1,234" is 1.234.
    Raises:
        UserError: a target holds no number.
    """

    def read_target(text: str) -> float:
        if (number := find_number(text, decimal_comma)) is None:
            raise UserError(f"continuous_scorer needs a number as target, not {quote(text)}")
        return number

    async def score(state: TaskState, target: Target) -> Score:
        wanted, number = read_target(target.text), find_number(state.output.completion, decimal_comma)
        if number is None:
            return _make_no_answer_score(
                "invalid_response_format", "no number in the answer, or several", target=wanted
            )
        metadata = {"scored": True, "prediction": number, "target": wanted}
        return Score(value=abs(number - wanted), answer=str(number), metadata=metadata)

    score.decimal_comma, score.needs_whole_answer, score.check_target = decimal_comma, True, read_target
    return score


def _check_options(options: Sequence[str]) -> list[str]:
    options = [str(o) for o in options]
    if len(options) < 2 or len(set(options)) < len(options) or not all(options):
        raise UserError(f"a scorer's options are two or more different texts, not {quote(options)}")
    return options


def _find_label(target: str, options: list[str]) -> str:
    for option in options:
        if plain(option) == plain(target):
            return option
    listed = ", ".join(map(quote, options[: 1 if redaction.is_enabled() else None]))
    raise UserError(f"the target {quote(target)} is none of the scorer's options: {listed}")


async def _read_logits(state: TaskState, options: list[str]) -> tuple[list[float], str | None] | None:
    """Read the options' logits of the model in memory, and which option was written; None: it was another model.

    They come with the answer where the provider knew the options; else they are requested now.
    """
    metadata = state.output.metadata or {}
    if {*options} <= {*metadata.get(OPTION_LOGITS, ())}:
        return [metadata[OPTION_LOGITS][o] for o in options], metadata[OPTION_SAID]
    try:
        option_logits = getattr(get_model().api, "option_logits")  # noqa: B009 (other models have none)
    except (ValueError, AttributeError):  # no model at all, when a log is scored anew; or another one
        return None
    prompt = state.messages[:-1] if state.messages[-1].role == "assistant" else state.messages
    logits = await option_logits(prompt, options)
    text = plain(state.output.completion)
    return [logits[o] for o in options], next((o for o in options if plain(o) == text), None)


def _spelling(token: str) -> str:
    """Spell a token for comparison with options: its vocabulary's mark for a space becomes one."""
    return token.replace("\u0120", " ").replace("\u2581", " ")


def _first_token(state: TaskState) -> Logprob | None:
    """Return the first generated token, with alternatives; None if there is none."""
    choice = state.output.choices[0] if state.output.choices else None
    tokens = choice.logprobs.content if choice and choice.logprobs else None
    if tokens is None or any(t.top_logprobs is None for t in tokens[:1]):
        raise UserError(
            "risk_scorer needs each token's log-probability and alternatives, and the answers have none: set logprobs=True "
            "and top_logprobs=20 in the task's GenerateConfig, or eval.top_logprobs=20; not every model gives them"
        )
    return tokens[0] if tokens else None


def _softmax(logprobs: list[float]) -> list[float]:
    highest = max(logprobs)
    weights = [math.exp(p - highest) for p in logprobs]
    return [w / sum(weights) for w in weights]


def _logsumexp(logits: list[float]) -> float:
    highest = max(logits)
    return highest + math.log(sum(math.exp(x - highest) for x in logits))


def _risk_score(
    shares: list[float], options: list[str], label: str, written: str | None, predicted: str | None = None
) -> Score:
    likeliest = options[max(range(len(options)), key=shares.__getitem__)]
    predicted = predicted or likeliest
    metadata = {
        "scored": True,
        "label": label,
        "predicted": predicted,
        "positive": options[-1],
        "said": written if written in options else "other",
        "risk": shares[-1],
        "confidence": max(shares),
        "options": dict(zip(options, shares, strict=True)),
    }
    return Score(value=CORRECT if predicted == label else INCORRECT, answer=predicted, metadata=metadata)


def _make_no_answer_score(reason: str, explanation: str, **metadata: Any) -> Score:
    return Score(value=NOANSWER, reason=reason, explanation=explanation, metadata={"scored": False} | metadata)
