"""Numbers in the texts that people and models write: read rightly or not at all, never as another number.

Read:        1,234.5   1.234,5   1 234   1'234   0,7   −5   -$3   1e-3   2 million   80 %   on a scale of 0 to 10: 7
Not read:    5-10   3/4 (a risk is)   2024-05-06   10:30   1.2.3   3rd   5kg   < 5   at least 5   2 + 3   May 5   two of 3
Passed over: v2   GPT-4   and scales as above
A text with several different numbers has none, but for what says it again behind ", or": "7, or 0.7 of them" is 7.

A comma before exactly three digits groups thousands (1,234) and a point there is a decimal point (1.234); with
`decimal_comma` both are the other way round. A blank before three digits groups, too (1 234).
"""

import math
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

# Signs and spaces of one meaning. An en dash is no sign: it may stand for a range or in a list.
_ALIKE = str.maketrans(
    {"\u2212": "-", "\u2010": "-", "\u2011": "-", "\ufe63": "-", "\uff0d": "-", "\uff0b": "+", "\u2019": "'"}
    | dict.fromkeys("\u00a0\u202f\u2009\u2007", " ")
)
# Digits with whatever may group them; `_value` says whether they are so grouped.
_DIGITS = re.compile(r"(?:\d+(?:(?:[.,']|[ ](?=\d{3}(?!\d)))\d+)*|(?<![.,\w])\.\d+)(?:[eE][-+]?\d+)?")
_DECIMAL = re.compile(r"(\d*)([.,])(\d+)")
_GROUPED = re.compile(r"([1-9]\d{0,2}([ ,.'])\d{3}(?:\2\d{3})*)(?:(?!\2)([.,])(\d+))?")
_NAME = re.compile(r"[^\W\d][-.+']?\Z")  # before the digits of v2, H1N1, GPT-4
_SIGN = re.compile(
    r"(?:(?:^|(?<=[\s(\[{:=*\"'`>~≈|]))([-+]?)(?:[$€£¥₹] ?)?([-+]?)|\b(minus|negative)\s+(?:[$€£¥₹] ?)?)\Z",
    re.IGNORECASE,
)
_PERCENT = re.compile(
    r"\s*(?:%|(?:per ?cent|percentage points?|pct|procent|prozent|pour ?cent|por cien?to|por cento|per cento)\b)",
    re.IGNORECASE,
)
_TIMES = {
    "hundred": 1e2, "thousand": 1e3, "million": 1e6, "millions": 1e6, "millionen": 1e6, "billion": 1e9, "billions": 1e9,
    "milliard": 1e9, "milliards": 1e9, "milliarde": 1e9, "milliarden": 1e9, "trillion": 1e12, "trillions": 1e12,
}  # fmt: skip
_MULTIPLIED = re.compile(rf"[ -]?({'|'.join(_TIMES)})\b", re.IGNORECASE)

# What makes another number of the digits behind it.
_COUNTED = (
    "zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|dozen|twenty|thirty|forty|fifty|sixty|seventy|"
    "eighty|ninety|hundred|thousand|million|half|thirds?|quarters?|fifths?|tenths?|point|twice|double|couple|few"
)
_BOUND = (
    r"(?:less|more|fewer|greater|higher|lower|larger|smaller)\s+than|at\s+(?:least|most)|up\s+to|under|over|above|below|"
    r"exceeds|between|from|until|not"
)
_MONTH = (
    "jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?|"
    "nov(?:ember)?|dec(?:ember)?"
)
_CHANGED_BEFORE = re.compile(
    rf"(?:[<>≤≥±^/×÷√–—]\s*|[-+,]|(?<![\w)])[-+]\s+|(?<!\w)-[a-z]+ ?|"
    rf"\b(?:(?:{_COUNTED})(?:\s+(?:out\s+of|of|in))?[\s-]+|(?:{_BOUND})\s+|(?:{_MONTH})\.?\s+)|n't\s+)(?:[$€£¥₹] ?)?\Z",
    re.IGNORECASE,
)
# The same of the digits before it.
_CHANGED_BEHIND = re.compile(
    r"\w|[-']\w|\.[^\W\d]|/|:\d|\+|\s+(?:degrees?\s+)?below\b|\s*[½⅓⅔¼¾‰]|\s*[*×÷^±=+]\s*[\d(.]|\s+x\s+\d|"
    r"\s+(?:[kmbt]|bn|mn|mio|mrd|tsd|mil|mille|lakhs?|crores?|dozens?|tausend|hundert|promille|permille|point|"
    r"hundreds?|thousands?|(?:mi|bi|tri)ll?\w+|[ap]\.?m|o'clock|uhr)\b|"
    rf"\s+(?:of\s+)?(?:{_MONTH})\b|\s+(?:and\s+)?(?:an?\s+)?(?:half|thirds?|quarters?|fifths?|tenths?)\b",
    re.IGNORECASE,
)
_RANGE = re.compile(r"\s*(?:[-–—~…]|\.\.+|\b(?:to|bis|through|until)\b)\s*", re.IGNORECASE)
_RATIO = re.compile(r"\s*(/)\s*|\s+(?:in|of|out\s+of|per|von|aus|sur|de|su|van)\s+", re.IGNORECASE)
_SCALE_OF = re.compile(r"\bscale(?:\s+(?:of|from))?:?\s\Z", re.IGNORECASE)


@dataclass(frozen=True)
class _Number:
    """What stands at begin to end, sign and per cent included, read as a number and as a risk; None: it is none."""

    value: float | None
    share: float | None
    begin: int
    end: int


# Two numbers that say which there are.
_SCALE = _Number(None, None, 0, 0)
_NEAR = 40  # letters before and behind a number that are looked at


def find_number(text: str, decimal_comma: bool = False) -> float | None:
    """The finite number that a text holds, "$" and per cent left aside; None where it holds none or several.

    Args:
        decimal_comma: "1,234" is 1.234 and "1.234" is 1234 (`writes_decimal_comma`).
    """
    for part in _said_again(text):
        values = {number.value for number in _numbers(part, decimal_comma)}
        if values:
            return values.pop() if len(values) == 1 else None
    return None


def find_risk(text: str) -> float | None:
    """The number in [0, 1] that a text holds, "80%" as 0.8 and "1 in 4" as 0.25; None where it holds none or several."""
    for part in _said_again(text):
        shares = {n.share if n.share is None else round(n.share, 12) for n in _numbers(part, decimal_comma=False)}
        if len(shares) > 1 or None in shares:
            return None
        if shares and 0 <= (share := shares.pop()) <= 1:
            return share
    return None


def writes_decimal_comma(texts: Iterable[str]) -> bool:
    """Whether the numbers of these texts have decimal commas: one of them for certain, and none a decimal point."""
    marks = {_decimal_mark(m[0]) for text in texts for m in _DIGITS.finditer(text.translate(_ALIKE))}
    return "," in marks and "." not in marks


def _said_again(text: str) -> list[str]:
    return re.split(r",\s+or\b", text.translate(_ALIKE))


def _numbers(text: str, decimal_comma: bool) -> list[_Number]:
    """Every number of a text but those of names and scales, ranges and ratios as one."""
    digits = [m for m in _DIGITS.finditer(text) if not _NAME.search(text[max(0, m.start() - 2) : m.start()])]
    found = deque(_number(text, m, decimal_comma) for m in digits)
    kept = []
    while found:
        one = found.popleft()
        if found and (joined := _joined(text, one, found[0])):
            found.popleft()
            if joined is _SCALE:
                continue
            one = joined
        before, behind = _around(text, one.begin, one.end)
        changed = _CHANGED_BEFORE.search(before) or _CHANGED_BEHIND.match(behind)
        kept.append(_Number(None, None, one.begin, one.end) if changed else one)
    return kept


def _number(text: str, match: re.Match[str], decimal_comma: bool) -> _Number:
    value = _value(match[0], decimal_comma)
    begin, end, negative = match.start(), match.end(), False
    before, behind = _around(text, begin, end)
    if sign := _SIGN.search(before):
        begin, negative = begin - len(sign[0]), "-" in sign[0] or sign[3] is not None
    percent = _PERCENT.match(behind)
    times = None if percent else _MULTIPLIED.match(behind)
    end += len((percent or times or [""])[0])
    if value is None:
        return _Number(None, None, begin, end)
    value *= (-1 if negative else 1) * (_TIMES[times[1].lower()] if times else 1)
    return _Number(value, value / 100 if percent else value, begin, end)


def _around(text: str, begin: int, end: int) -> tuple[str, str]:
    return text[max(0, begin - _NEAR) : begin], text[end : end + _NEAR]


def _joined(text: str, one: _Number, other: _Number) -> _Number | None:
    """Two numbers as one where they are a ratio or a range; None where they are neither."""
    between, (before, behind) = text[one.end : other.begin], _around(text, one.begin, other.end)
    if ratio := _RATIO.fullmatch(between):
        return _Number(None, _ratio(one.value, other.value, slash=ratio[1] is not None), one.begin, other.end)
    bracketed = before.endswith(("(", "[")) and behind.startswith((")", "]"))
    listed = bracketed and between.strip() == "," or between.strip() == "and" and before.lower().endswith("between ")
    if not _RANGE.fullmatch(between) and not listed:
        return None
    scale = bracketed or re.match(r"\s?:(?!\d)|[\s-]scale\b", behind) or _SCALE_OF.search(before)
    return _SCALE if scale else _Number(None, None, one.begin, other.end)


def _ratio(part: float | None, whole: float | None, slash: bool) -> float | None:
    """ "1 in 4"; 50/50 and 60/40 are odds."""
    if part is None or whole is None or not 0 <= part <= whole or whole == 0:
        return None
    return None if slash and part > 1 and part + whole == 100 else part / whole


def _value(digits: str, decimal_comma: bool) -> float | None:
    """Digits with points, commas, blanks and an exponent as a number; None where they are grouped in no known way."""
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
    """Whether a point or comma between these digits may group thousands."""
    return len(part) == 3 and re.fullmatch(r"[1-9]\d{0,2}", whole) is not None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _decimal_mark(digits: str) -> str | None:
    """What stands for certain before the decimals of these digits, or would: 1.234.567 leaves the comma for it."""
    if decimal := _DECIMAL.fullmatch(digits):
        whole, mark, part = decimal.groups()
        return None if _is_ambiguous(whole, part) else mark
    grouped = _GROUPED.fullmatch(digits)
    if grouped is None:
        return None
    return grouped[3] or {".": ",", ",": "."}.get(grouped[2])
