"""Numbers in the texts that people and models write: read rightly or not at all, never as another number.

Read:        1,234.5   1.234,5   1 234   1'234   0,7   −5   -$3   1e-3   2 million   80 %   on a scale of 0 to 10: 7
             The answer is about 5 years.   She has 5 apples.
Not read:    5-10   3/4 (a risk is)   2024-05-06   10:30   1.2.3   3rd   5kg   < 5   at least 5   2 + 3   May 5   two of 3
Passed over: v2   GPT-4   and scales as above
A text with several different numbers has none, but for what says it again behind ", or": "7, or 0.7" is 7.

A number is read only where all that touches it, and the words beside it, are known to leave it what it is (`_is_led`,
`_is_followed`, `number_words`): no list of what changes a number could be complete. Lists of what does serve only where
other words stand between: "The minimum is 5".

A comma before exactly three digits groups thousands (1,234) and a point there is a decimal point (1.234); with
`decimal_comma` both are the other way round. A blank before three digits groups, too (1 234).
"""

import math
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

from cruijff_kit.evaluation.number_words import (
    BOUNDS,
    CHANGES_BEHIND,
    COUNTED,
    GOES_ON,
    IN_WHAT,
    LEADS,
    MONTHS,
    NEGATIONS,
    OBJECTIONS,
    OF_SHARES,
    OF_WHOM,
    PAIRS,
    QUALIFIERS,
    STATES,
    TO_BE,
    TO_WHOM,
    UNITS,
    is_plural,
)  # fmt: skip

# Signs and spaces of one meaning. An en dash is no sign: it may stand for a range or in a list.
_ALIKE = str.maketrans(
    {"\u2212": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-", "\uff0d": "-", "\uff0b": "+", "\u2019": "'"}
    | dict.fromkeys("\u00a0\u202f\u2009\u2007", " ")
)
# Digits with whatever may group them; `_read_digits` says whether they are so grouped.
_DIGITS = re.compile(r"(?:\d+(?:(?:[.,']|[ ](?=\d{3}(?!\d)))\d+)*|(?<![.,\w])\.\d+)(?:[eE][-+]?\d+)?")
_DECIMAL = re.compile(r"(\d*)([.,])(\d+)")
_GROUPED = re.compile(r"([1-9]\d{0,2}([ ,.'])\d{3}(?:\2\d{3})*)(?:(?!\2)([.,])(\d+))?")
_NAME = re.compile(r"[^\W\d][-.+']?\Z")  # before the digits of v2, H1N1, GPT-4
_MONEY = "[$€£¥₹]"
_SIGN = re.compile(
    rf"(?:(?:^|(?<=[\s(\[{{:=*\"'`>~≈|]))(?P<sign>[-+]?)(?P<money>{_MONEY} ?)?(?P<again>[-+]?)|"
    rf"\b(?:US|CA?|AU?|NZ|HK|R)\$|\b(?P<minus>minus|negative)\s+(?:{_MONEY} ?)?)\Z",
    re.IGNORECASE,
)
_BRACKET, _BRACKETED = re.compile(r"\(\s?([A-Z]{3} )?\Z"), re.compile(rf"\s?(?:[A-Z]{{3}}|{_MONEY})?\s?\)")
_PER_CENT = r"per ?cent|percentage points?|pct|procent|prozent|pour ?cent|por cien?to|por cento|per cento"
_PERCENT = re.compile(rf"\s*(?:\\?%|(?:{_PER_CENT})\b)", re.IGNORECASE)
_TIMES = {
    "hundred": 1e2, "thousand": 1e3, "million": 1e6, "millions": 1e6, "millionen": 1e6, "billion": 1e9, "billions": 1e9,
    "milliard": 1e9, "milliards": 1e9, "milliarde": 1e9, "milliarden": 1e9, "trillion": 1e12, "trillions": 1e12,
}  # fmt: skip
_MULTIPLIED = re.compile(rf"[ -]?({'|'.join(_TIMES)})\b", re.IGNORECASE)
# Says what a number is, elsewhere in the text: "Risk (%): 1", "log odds: 0.5", "Income (in thousands): 5".
_IS_NO_SHARE = re.compile(rf"[%‰]|\b(?:{_PER_CENT}|percentage|per ?mille|promille|log|odds|ratio)\b", re.IGNORECASE)
_IS_MULTIPLE = re.compile(
    r"\bin\s+(?:hundred|thousand|(?:m|b|tr)illion)|\b(?:hundred|thousand|(?:m|b|tr)illion)s\b", re.I
)
_RANGE = re.compile(r"\s*(?:[-–—~…]|\.\.+|\b(?:to|bis|through|until)\b)\s*", re.IGNORECASE)
_RATIO = re.compile(r"\s*(/)\s*|\s+(out\s+of)\s+|\s+(?:in|of|per|von|aus|sur|de|su|van)\s+", re.IGNORECASE)
_YEAR = re.compile(r"(?:19|20)\d\d")
_SCALE_OF = re.compile(r"\bscale(?:\s+(?:of|from))?:?\s\Z", re.IGNORECASE)

# What may touch a number's first and last character: what encloses it, then a blank or a mark.
_OPENED = re.compile(r"(?:\\(?:boxed|text|textbf|mathbf|mathrm)\{|\\[(\[]|[*_\"'`“”„«(\[{|$])+\Z")
_LED = re.compile(r"(?:\A|[\s:=~≈→]|\.\.|…)\Z")
_CLOSED = re.compile(rf"(?:\s?{_MONEY}|\s?°(?:[cCfF]\b)?|<(?:/\w+|\|\w+\|)>|\\[)\]]|[*_\"'`“”»)\]}}|$])*")
_FOLLOWED = re.compile(r"\s|\Z|(?:[.…!?]+|[,;:])[*_\"'`“”»)\]}|$]*(?:\s|\Z)|,\"")
_TIMES_SIGN = re.compile(r"[^\s*]\s+\*\s*\Z")  # x * 5
_ITEM = re.compile(r"[*_]*[.)\]][*_]*[ \t]+\w")  # "1. The risk is high"
_OBJECTING = NEGATIONS | BOUNDS | OBJECTIONS
_TOKEN = re.compile(r"\n|[^\W\d_]+(?:'[^\W\d_]+)?|\d+(?:[.,]\d+)*|\S")


@dataclass(frozen=True)
class _Number:
    """What stands at begin to end, sign and per cent included, read as a number and as a risk; None: it is none."""

    value: float | None
    share: float | None
    begin: int
    end: int
    is_plain: bool = False
    """Whether it is but digits, as the parts of ratios are."""
    is_percent: bool = False


# Two numbers that say which there are.
_SCALE = _Number(None, None, 0, 0)
_NEAR = 60  # letters before and behind a number that are looked at


def find_number(text: str, decimal_comma: bool = False) -> float | None:
    """Find the finite number of a text, "$" and per cent left aside; None where it has none or several.

    Args:
        decimal_comma: "1,234" is 1.234 and "1.234" is 1234 (`writes_decimal_comma`).
    """
    parts = _read_parts(text, decimal_comma)
    values = {number.value for number in parts[0]} if parts else set()
    return values.pop() if len(values) == 1 and _agree(parts) else None


def find_risk(text: str) -> float | None:
    """Find the number in [0, 1] of a text, "80%" as 0.8 and "1 in 4" as 0.25; None where it has none or several."""
    parts = _read_parts(text, decimal_comma=False)
    every = [{n.share if n.share is None else round(n.share, 12) for n in part} for part in parts]
    if any(len(shares) > 1 or None in shares for shares in every) or not _agree(parts):
        return None
    return next((share for (share,) in every if 0 <= share <= 1), None)


def writes_decimal_comma(texts: Iterable[str]) -> bool:
    """Return whether these texts write decimal commas: at least one number surely does, and none has a decimal point."""
    marks = {_decimal_mark(m[0]) for text in texts for m in _DIGITS.finditer(text.translate(_ALIKE))}
    return "," in marks and "." not in marks


def _read_parts(text: str, decimal_comma: bool) -> list[list[_Number]]:
    """Find the numbers of each part of a text that has some; a part repeats what the one before it said."""
    parts = re.split(r",\s+or\b(?=[^\d\n]{0,20}\d)", text.translate(_ALIKE))
    return [numbers for part in parts if (numbers := _find_numbers(part, decimal_comma))]


def _agree(parts: list[list[_Number]]) -> bool:
    """Return whether parts have the same value: 0.7, or 70%, or 7 of 10."""

    def same(one: float | None, other: float | None) -> bool:
        if one is None or other is None:
            return False
        less, more = sorted((one, other))
        return (
            math.isclose(less, more) or 0 <= less < 1 and any(math.isclose(more, less * times) for times in (10, 100))
        )

    return all(same(parts[0][0].share, number.share) for part in parts[1:] for number in part)


def _find_numbers(text: str, decimal_comma: bool) -> list[_Number]:
    """Find every number of a text but those of names and scales; ranges and ratios are one number."""
    digits = [m for m in _DIGITS.finditer(text) if not _NAME.search(text[max(0, m.start() - 2) : m.start()])]
    every = [_read_number(text, m, decimal_comma) for m in digits]
    queue, numbers = deque(every), []
    while queue:
        number = queue.popleft()
        if queue and (joined := _join(text, number, queue[0])):
            queue.popleft()
            if joined is _SCALE:
                continue
            number = joined
        numbers.append(_check_surroundings(text, number))
    return _apply_distant_units(text, every, numbers) if numbers else []


def _read_number(text: str, match: re.Match[str], decimal_comma: bool) -> _Number:
    value = _read_digits(match[0], decimal_comma)
    begin, end, is_negative, is_money = match.start(), match.end(), False, False
    before, behind = _around(text, begin, end)
    if sign := _SIGN.search(before):
        begin, is_negative = begin - len(sign[0]), "-" in sign[0] or sign["minus"] is not None
        is_money = sign["money"] is not None and not behind.startswith("$")  # $5$ is no money
        is_phone = "+" in sign[0] and " " in match[0]
        if sign["sign"] and sign["again"] or is_phone:
            value = None
    percent = _PERCENT.match(behind)
    times = None if percent else _MULTIPLIED.match(behind)
    end += len((percent or times or [""])[0])
    bracket = _BRACKET.search(text[max(0, begin - 6) : begin])
    is_amount = is_money or _GROUPED.fullmatch(match[0]) or bracket and bracket[1]
    if value is None or bracket and is_amount and _BRACKETED.match(text[end : end + 8]):  # an accountant's minus
        return _Number(None, None, begin, end)
    value *= (-1 if is_negative else 1) * (_TIMES[times[1].lower()] if times else 1)
    share = None if is_money else value / 100 if percent else value
    is_plain = not percent and begin == match.start() and not re.match(r"0\d", match[0])
    return _Number(value, share, begin, end, is_plain, percent is not None)


def _around(text: str, begin: int, end: int) -> tuple[str, str]:
    return text[max(0, begin - _NEAR) : begin], text[end : end + _NEAR]


def _join(text: str, one: _Number, other: _Number) -> _Number | None:
    """Join two numbers that are a ratio or a range; None where they are neither."""
    between, (before, behind) = text[one.end : other.begin], _around(text, one.begin, other.end)
    if ratio := _RATIO.fullmatch(between):
        of_year = _YEAR.fullmatch(text[other.begin : other.end]) is not None and not ratio[2]
        if of_year and not ratio[1] and one.value == 1 and other.value % 100 == 0:  # 1 in 2000
            of_year = False
        whole = ratio[1] or ratio[2] or one.value is None or one.value == int(one.value)
        is_ratio = one.is_plain and other.is_plain and whole and not of_year
        share = _read_ratio(one.value, other.value, slash=ratio[1] is not None) if is_ratio else None
        return _Number(None, share, one.begin, other.end)
    bracketed = before.endswith(("(", "[")) and behind.startswith((")", "]"))
    listed = bracketed and between.strip() == "," or between.strip() == "and" and before.lower().endswith("between ")
    if not _RANGE.fullmatch(between) and not listed:
        return None
    scale = bracketed or re.match(r"\s?:(?!\d)|[\s-]scale\b", behind) or _SCALE_OF.search(before)
    return _SCALE if scale else _Number(None, None, one.begin, other.end)


def _check_surroundings(text: str, number: _Number) -> _Number:
    """Return the number, or what is left of it: what stands around it may make it another one."""
    before, behind = _around(text, number.begin, number.end)
    opened, closed = _OPENED.search(before), _CLOSED.match(behind)
    enclosed = opened[0] if opened else ""
    before, behind = before[: len(before) - len(enclosed)], behind[closed.end() :]
    digits = text[number.begin : number.end]
    is_item = (not before or before.endswith("\n")) and digits.isdecimal() and _ITEM.match(closed[0] + behind)
    is_power = enclosed.strip("_") != enclosed.strip("*_") and "*" not in closed[0] + behind  # x *5
    is_size = enclosed.endswith("|") and digits.startswith("-")  # |-5|
    is_led = not (is_item or is_power or is_size) and _is_led(before, enclosed)
    unit = _is_followed(behind, number.is_percent) if is_led else None
    if unit is None:
        return replace(number, value=None, share=None)
    is_counted = unit or any(mark in closed[0] for mark in "°€£¥₹") or "$" in closed[0] and "$" not in enclosed + digits
    return replace(number, share=None) if is_counted and not number.is_percent and number.value is not None else number


def _is_led(before: str, enclosed: str) -> bool:
    """Whether all that stands before a number, and before what encloses it, leaves it what it is.

    From the number on leftward: qualifiers ("about"), then a word or mark that leads to it ("is", ":"), then whatever does
    not deny or bound it.
    """
    if before and not _LED.search(before) or _TIMES_SIGN.search(before):
        return False
    tokens = _TOKEN.findall(before.lower())[::-1]
    led, may_deny = "(" in enclosed, True  # Five (5)
    for token, left in pairwise([*tokens, "\n"]):
        if token == "=" and left in "<>!≤≥/≠" or token == "-" and left == "(":
            return False
        if token in "\n:=~≈→|…)]" or token in LEADS or left in PAIRS.get(token, ()):
            led = True
        elif token == ",":
            led, may_deny = True, False  # "No, 5"
        elif token in "!?;" or token == "." and led:
            return True
        elif token == "." and left not in QUALIFIERS:  # "Sure. 5" and "...5" are, "Sept. 5" is none
            return left in (".", "yes", "sure", "okay", "ok") or len(left) > 5 and left not in BOUNDS | COUNTED | MONTHS
        elif token in "#•" and left not in "#•":
            return led or left == "\n"
        elif token == "or":
            return left[0].isdigit() or left in "%)" or left.startswith("percent")
        elif token in BOUNDS or token in COUNTED and may_deny and "(" not in enclosed:
            return False
        elif (
            token not in QUALIFIERS | COUNTED and not (led and token in TO_BE) and token not in "#•.*_\"'`“”„«»([{}$\\"
        ):
            return led and not (may_deny and (token in NEGATIONS or token.endswith("n't")))
    return True


def _is_followed(behind: str, is_percent: bool) -> bool | None:
    """Return whether a number has a unit; None: the text behind it may change its value."""
    if not _FOLLOWED.match(behind):
        return None
    tokens = [*_TOKEN.findall(behind.lower()), "", ""]
    has_unit = has_ended = False
    for place, (token, right) in enumerate(pairwise(tokens[:-1])):
        after, last = tokens[place + 2], tokens[place - 1] if place else ""
        if token in ".,;:" and right[:1].isdigit() or token == "or" and right != "so" and not _says_again(right, after):
            return None
        if token == "or" and right != "so":
            return has_unit
        if token in "\n.,;:!?…)]}\"'*_`“”»|$([":
            has_ended = True
        elif has_ended:
            return None if token in CHANGES_BEHIND or token == "-" and right == ")" else has_unit
        elif token in "-–—" and len(right) > 1 and right[0].isalpha():
            has_ended = True
        elif (
            token in UNITS or is_plural(token) or token in ("per", "a", "an", "last", "this", "next") and right in UNITS
        ):
            has_unit = True
        elif token in ("of", "to") and last in OF_SHARES:  # a 35% chance of rain
            return has_unit if right[:1].isalpha() and (is_percent or right not in COUNTED | {"a", "an"}) else None
        elif token == "of" and (is_percent and right in OF_WHOM or right == "them"):
            return has_unit or not is_percent
        elif token == "to" and right in TO_WHOM or token == "in" and right in IN_WHAT:
            return has_unit
        elif token in GOES_ON:
            is_doubted = token in STATES and not _OBJECTING.isdisjoint(tokens[place + 1 : place + 5])
            is_changed = is_doubted or right[:1].isdigit() or right in CHANGES_BEHIND | BOUNDS | NEGATIONS
            return None if is_changed else has_unit
        elif token not in OF_SHARES and token != "or" and last != "or":
            return None
    return has_unit


def _says_again(first: str, second: str) -> bool:
    """Return whether these words behind "or" are, or begin with, a number."""
    return first[:1].isdigit() or second[:1].isdigit() and (first in QUALIFIERS or first in "$€£-")


def _apply_distant_units(text: str, every: list[_Number], numbers: list[_Number]) -> list[_Number]:
    """Void numbers of which the text says elsewhere that they are per cent, log-odds or thousands."""
    outside, at = [], 0
    for number in every:
        outside.append(text[at : number.begin])
        at = max(at, number.end)
    rest = "0".join([*outside, text[at:]])
    if _IS_MULTIPLE.search(rest):
        return [replace(number, value=None, share=None) for number in numbers]
    if _IS_NO_SHARE.search(rest):
        return [number if number.is_percent else replace(number, share=None) for number in numbers]
    return numbers


def _read_ratio(part: float | None, whole: float | None, slash: bool) -> float | None:
    """Read "1 in 4"; 50/50 and 60/40 are odds."""
    if part is None or whole is None or not 0 <= part <= whole or whole == 0:
        return None
    return None if slash and part > 1 and part + whole == 100 else part / whole


def _read_digits(digits: str, decimal_comma: bool) -> float | None:
    """Read digits with points, commas, blanks and an exponent; None where they are grouped in no known way."""
    body, _, exponent = digits.lower().partition("e")
    if decimal := _DECIMAL.fullmatch(body):
        whole, mark, part = decimal.groups()
        if _is_ambiguous(whole, part) and mark == ("." if decimal_comma else ","):
            return None if exponent else float(whole + part)
        return _finite(float(f"{whole or 0}.{part}e{exponent or 0}"))
    if grouped := _GROUPED.fullmatch(body):
        return None if exponent else float(re.sub(r"\D", "", grouped[1]) + "." + (grouped[4] or "0"))
    return _finite(float(digits)) if body.isdecimal() else None


def _is_ambiguous(whole: str, part: str) -> bool:
    """Return whether a point or comma between these digits may group thousands."""
    return len(part) == 3 and re.fullmatch(r"[1-9]\d{0,2}", whole) is not None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _decimal_mark(digits: str) -> str | None:
    """Return the certain decimal separator of these digits: that of 1.234.567 can only be the comma."""
    if decimal := _DECIMAL.fullmatch(digits):
        whole, mark, part = decimal.groups()
        return None if _is_ambiguous(whole, part) else mark
    grouped = _GROUPED.fullmatch(digits)
    if grouped is None:
        return None
    return grouped[3] or {".": ",", ",": "."}.get(grouped[2])
