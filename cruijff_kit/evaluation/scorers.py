"""Scorers for answers that are an option or a number; inspect-ai's match and includes serve all others.

    from cruijff_kit.evaluation.scorers import risk_scorer
    Task(..., scorer=risk_scorer(("0", "1")), config=GenerateConfig(max_tokens=1, logprobs=True, top_logprobs=20))

They work in any inspect-ai task and with any model. A sample that cannot be scored has the value "N", the reason, and
metadata["scored"] = False; `metrics` leaves it out and reports the share of the others.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from inspect_ai.model import Logprob, get_model
from inspect_ai.scorer import CORRECT, INCORRECT, NOANSWER, Score, Scorer, Target, scorer
from inspect_ai.solver import TaskState

from cruijff_kit.errors import UserError
from cruijff_kit.evaluation import metrics
from cruijff_kit.withheld import active, quoted

# Not a part of a word, nor of a number with commas.
_NUMBER = re.compile(r"(?<![\w.])(?<!\d,)-?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?(?!\w|,\d{3}\b)")
_OPTIONS = [metrics.accuracy(), metrics.stderr(), metrics.balanced_accuracy(), metrics.f1(), metrics.confusion()]
_RISKS = [metrics.auc(), metrics.brier(), metrics.c_ece(), metrics.r_ece()]
_NUMBERS = [metrics.mae(), metrics.rmse(), metrics.r_squared(), metrics.parse_rate()]


@scorer(metrics=[*_OPTIONS, *_RISKS, metrics.coverage()])
def risk_scorer(option_tokens: Sequence[str] = ("0", "1")) -> Scorer:
    """Probabilities of the options as the first token of the answer; risk = P(last option).

    Softmax of the token's log-probabilities over the options. For the model in memory tokens are compared by id: an
    option's is the one that training teaches behind this very prompt; for other models by spelling. The task must ask
    for log-probabilities with alternatives; a sample where an option is not among them is not scored.

    Args:
        option_tokens: two or more texts, each a single token; targets are among them.
    Raises:
        UserError: an option is not a single token, the log has no log-probabilities, or a target is no option.
    """
    options = _checked(option_tokens)

    async def score(state: TaskState, target: Target) -> Score:
        label, spelt = _label(target, options), _spelling(state, options)
        first = _first_token(state)
        if first is None:
            return _unscored("no_response", "nothing was generated")
        found = {_plain(t.token, spelt): t.logprob for t in [*first.top_logprobs, first]}
        missing = [o for o in options if spelt.get(o, o) not in found]
        if missing:
            return _unscored("missing_option", f"not among the {len(found)} likeliest tokens: {', '.join(missing)}")
        said = next((o for o in options if spelt.get(o, o) == _plain(first.token, spelt)), "other")
        return _risk_score(_softmax([found[spelt.get(o, o)] for o in options]), options, label, said)

    return score


@scorer(metrics=[*_OPTIONS, *_RISKS, metrics.parse_rate()])
def numeric_risk_scorer(options: Sequence[str] = ("0", "1"), threshold: float = 0.5) -> Scorer:
    """The risk as a number in the answer's text: the first one in [0, 1]; "80%" is 0.8.

    Args:
        options: the two labels; the risk is that of the last.
        threshold: from this risk on the last option counts as predicted.
    Raises:
        UserError: a target is no option.
    """
    options = _checked(options)
    if len(options) != 2:
        raise UserError(f"numeric_risk_scorer takes two options, not {len(options)}")

    async def score(state: TaskState, target: Target) -> Score:
        label = _label(target, options)
        risk = find_risk(state.output.completion)
        if risk is None:
            return _unscored("invalid_response_format", "no number in [0, 1] in the answer")
        predicted = options[risk >= threshold]
        return _risk_score([1 - risk, risk], options, label, predicted, predicted)

    return score


@scorer(metrics=[*_OPTIONS, metrics.coverage()])
def binary_scorer(options: Sequence[str] = ("0", "1")) -> Scorer:
    """The answer's text is an option, or something else, which is wrong ("other" in the confusion).

    Args:
        options: two or more texts; the last is the positive class; targets are among them.
    Raises:
        UserError: a target is no option.
    """
    options = _checked(options)

    async def score(state: TaskState, target: Target) -> Score:
        label, text = _label(target, options), state.output.completion.strip()
        said = next((o for o in options if o.strip() == text), "other")
        kept = {"scored": True, "label": label, "predicted": said, "positive": options[-1], "said": said}
        return Score(value=CORRECT if said == label else INCORRECT, answer=text, metadata=kept)

    return score


@scorer(metrics=_NUMBERS)
def continuous_scorer() -> Scorer:
    """The first number in the answer's text against the target's; "$", "," and "%" do not count. Value: |difference|.

    Raises:
        UserError: a target holds no number.
    """

    async def score(state: TaskState, target: Target) -> Score:
        wanted, number = find_number(target.text), find_number(state.output.completion)
        if wanted is None:
            raise UserError(f"continuous_scorer needs a number as target, not {quoted(target.text)}")
        if number is None:
            return _unscored("invalid_response_format", "no number in the answer")
        kept = {"scored": True, "prediction": number, "target": wanted}
        return Score(value=abs(number - wanted), answer=str(number), metadata=kept)

    return score


def find_risk(text: str) -> float | None:
    """The first number in [0, 1] in a text, per cent counted as hundredths; None if there is none."""
    for match in _NUMBER.finditer(text):
        value = float(match[0]) / (100 if text[match.end() :].lstrip().startswith("%") else 1)
        if 0 <= value <= 1:
            return value
    return None


def find_number(text: str) -> float | None:
    """The first finite number in a text without "$", "," and "%"; None if there is none."""
    values = (float(m[0]) for m in _NUMBER.finditer(re.sub(r"[$,%]", "", text)))
    return next((v for v in values if math.isfinite(v)), None)


def _checked(options: Sequence[str]) -> list[str]:
    options = [str(o) for o in options]
    if len(options) < 2 or len(set(options)) < len(options) or not all(options):
        raise UserError(f"a scorer's options are two or more different texts, not {quoted(options)}")
    return options


def _label(target: Target, options: list[str]) -> str:
    text = target.text.strip()
    for option in options:
        if option.strip() == text:
            return option
    listed = ", ".join(map(quoted, options[: 1 if active() else None]))
    raise UserError(f"the target {quoted(target.text)} is none of the scorer's options: {listed}")


def _spelling(state: TaskState, options: list[str]) -> dict[str, str]:
    """Option -> how the tokenizer of the model in memory spells the id that continues this prompt; empty elsewhere.

    Spelling is one to one with ids (ChatTokenizer.token), so comparing spellings is comparing ids.
    """
    try:
        tokenizer = getattr(get_model().api, "chat_model").tokenizer  # noqa: B009 (other models have none)
    except (ValueError, AttributeError):  # no model at all, when a log is scored anew; or another one
        return {}
    asked = list(state.messages)
    while asked and asked[-1].role == "assistant":
        asked.pop()
    messages = [{"role": m.role, "content": m.text} for m in asked]
    return {option: tokenizer.token(_option_id(tokenizer, messages, option)) for option in options}


def _plain(token: str, spelling: dict[str, str]) -> str:
    """A token as options are compared with: as it is for the model in memory, else with its mark for a space as one."""
    return token if spelling else token.replace("\u0120", " ").replace("\u2581", " ")


def _option_id(tokenizer: Any, messages: list[dict[str, str]], option: str) -> int:
    ids, prompt = tokenizer.example(messages, option)
    answer = [i for i in ids[prompt:] if i not in tokenizer.stop_tokens]
    if len(answer) != 1:
        spelt = quoted(answer) if active() else " ".join(repr(tokenizer.token(i)) for i in answer)
        raise UserError(
            f"risk_scorer: the option {quoted(option)} is {len(answer)} tokens of this model ({spelt}), not a single one; "
            "choose options that are one token each, such as digits or letters"
        )
    return answer[0]


def _first_token(state: TaskState) -> Logprob | None:
    """The first token that was generated, with alternatives; None if there is none."""
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


def _risk_score(shares: list[float], options: list[str], label: str, said: str, predicted: str | None = None) -> Score:
    likeliest = options[max(range(len(options)), key=shares.__getitem__)]
    predicted = predicted or likeliest
    kept = {
        "scored": True,
        "label": label,
        "predicted": predicted,
        "positive": options[-1],
        "said": said if said in options else "other",
        "risk": shares[-1],
        "confidence": max(shares),
        "options": dict(zip(options, shares, strict=True)),
    }
    return Score(value=CORRECT if predicted == label else INCORRECT, answer=predicted, metadata=kept)


def _unscored(reason: str, explanation: str) -> Score:
    return Score(value=NOANSWER, reason=reason, explanation=explanation, metadata={"scored": False})
