"""Numbers in texts: read rightly or not at all. Each form with the number and the risk that it holds, None for neither."""

import random

import pytest

from cruijff_kit.evaluation.numbers import find_number, find_risk, writes_decimal_comma

FORMS = [
    ("0,7", 0.7, 0.7), ("0,75", 0.75, 0.75), ("1,5", 1.5, None), ("12,50", 12.5, None), ("\u22125", -5, None),
    ("-5", -5, None), ("\u22120,5", -0.5, None), ("1 in 4", None, 0.25), ("1 out of 4", None, 0.25),
    ("1 of 4", None, 0.25), ("3/4", None, 0.75), ("1 von 4", None, 0.25), ("25 percent", 25, 0.25), ("25%", 25, 0.25),
    ("80 %", 80, 0.8), ("0.5%", 0.5, 0.005), ("0,5 Prozent", 0.5, 0.005), ("150%", 150, None),
    ("0 to 1: 0.8", 0.8, 0.8), ("(0-1): 0.8", 0.8, 0.8), ("On a scale of 0 to 10: 7", 7, None),
    ("on a scale from 0 to 1, 0.3", 0.3, 0.3), ("between 0 and 1: 0.8", 0.8, 0.8), ("0% to 100%: 80%", 80, 0.8),
    ("on a 0-10 scale, 7", 7, None), ("1,234", 1234, None), ("1,234,567", 1234567, None),
    ("1.234.567", 1234567, None), ("1 234", 1234, None), ("1'234", 1234, None), ("1\u2019234", 1234, None),
    ("1\u202f234\u202f567", 1234567, None), ("1.234,5", 1234.5, None), ("1,234.5", 1234.5, None),
    ("1 234,5", 1234.5, None), ("1.234", 1.234, None), ("0,800", 0.8, 0.8), ("1234,567", 1234.567, None),
    ("12,34,567", None, None), ("1,234,56", None, None), ("$1,2", 1.2, None), ("$1,100", 1100, None),
    ("-$5", -5, None), ("$-5", -5, None), ("\u2212$5", -5, None), ("\u20ac3,50", 3.5, None), ("3 USD", 3, None),
    ("-US$5", None, None), ("1e-3", 0.001, 0.001), ("1E5", 100000.0, None), ("1e999", None, None), (".5", 0.5, 0.5),
    ("-.5", -0.5, None), ("Risk: .25.", 0.25, 0.25), ("5-10", None, None), ("5\u201310", None, None),
    ("5 to 10", None, None), ("between 5 and 10", None, None), ("0.2-0.4", None, None), ("10%-20%", None, None),
    ("2024-05-06", None, None), ("6/5/2024", None, None), ("06.05.2024", None, None), ("May 5", None, None),
    ("5 May 2024", None, None), ("10:30", None, None), ("5 pm", None, None), ("3rd", None, None), ("1st", None, None),
    ("21st of May", None, None), ("1.2.3", None, None), ("v2", None, None), ("v2: 7", 7, None),
    ("GPT-4 says 0.3", 0.3, 0.3), ("COVID-19", None, None), ("192.168.0.1", None, None), ("half", None, None),
    ("one half", None, None), ("half of 10", None, None), ("seven of 10", None, None), ("twenty 5", None, None),
    ("zero point 8", None, None), ("5 and a half", None, None), ("5\xbd", None, None), ("\xbd", None, None),
    ("5k", None, None), ("5 k", None, None), ("2 million", 2000000.0, None), ("1,5 Millionen", 1500000.0, None),
    ("2 Billionen", None, None), ("2 billion", 2000000000.0, None), ("3 thousand", 3000, None),
    ("5 dozen", None, None), ("$1.5M", None, None), ("5kg", None, None), ("5 kg", 5, None), ("20\xb0C", 20, None),
    ("<5", None, None), ("> 0.5", None, None), ("at least 5", None, None), ("less than 1%", None, None),
    ("5+", None, None), ("~5", 5, None), ("about 5", 5, None), ("5 \xb1 1", None, None), ("2 + 3", None, None),
    ("2 + 3 = 5", None, None), ("10*2", None, None), ("3 x 10", None, None), ("10^3", None, None),
    ("10\xb2", None, None), ("x = 5", 5, None), ("**5**", 5, None), ("\\boxed{5}", 5, None), ("`5`", 5, None),
    ('"5"', 5, None), ("(5)", 5, None), ("5.", 5, None), ("...5", 5, None), ("- 5", None, None),
    ("\u2013 5", None, None), ("\u20135", None, None), ("minus 5", -5, None), ("negative 0.5", -0.5, None),
    ("+5", 5, None), ("not 5", None, None), ("1, 2, 3", None, None), ("1,2,3", None, None), ("5 or 6", None, None),
    ("I say 7, or 0.7", 7, 0.7), ("I think 5. So the answer is 5.", 5, None), ("0.8 (80%)", None, 0.8),
    ("80 out of 100", None, 0.8), ("50/50", None, None), ("60/40", None, None), ("24/7", None, None),
    ("1 person in 4", None, None), ("Class 0: 0.3, class 1: 0.7", None, None), ("1:4", None, None), ("", None, None),
    ("none", None, None), ("nan", None, None), ("inf", None, None), ("1", 1, 1), ("0", 0, 0), ("1.0", 1, 1),
    ("100%", 100, 1), ("-0.2", -0.2, None), ("$1,234.50", 1234.5, None), ("-3 degrees", -3, None), ("1e-1", 0.1, 0.1),
    ("1,000", 1000, None), ("1_000", None, None), ("2024", 2024, None), ("5\n10", None, None),
    ("Answer:\n5", 5, None), ("5 \u2030", None, None), ("007", 7, None), ("1 2345", None, None), ("\u0663", 3, None),
    ("one in 10", None, None), ("1/", None, None), ("1.e3", None, None), ("5 below zero", None, None),
    ("+/-5", None, None), ("Answer - 5", None, None), ("Answer\u20135", None, None), ("Answer: -5.", -5, None),
    ("approx. 12.000,00 \u20ac", 12000, None), ("roughly 0.3 or 30%", None, 0.3), ("0.3, or 30%", 0.3, 0.3),
    ("30%, or 0.3", 30, 0.3), ('{"risk": 0.25}', 0.25, 0.25), ("a chance of 1 in 4", None, 0.25),
    ("4.5 out of 5", None, 0.9), ("7/10", None, 0.7), ("1 chance in 4", None, None), ("99,9 %", 99.9, 0.999),
    ("0 in 10", None, 0), ("10 of 10", None, 1), ("11 of 10", None, None), ("1 1/2", None, None),
    ("2 x 3", None, None), ('5\'10"', None, None), ("1990s", None, None), ("0x1F", None, None),
    ("\xa33.50", 3.5, None), ("CHF 1'234.50", 1234.5, None), ("[1] 5", None, None), ("Five (5)", 5, None),
    ("1.234e3", 1234, None), ("6.02\xd710\xb2\xb3", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number", "risk"), FORMS, ids=[ascii(form[0]) for form in FORMS])
def test_a_form(text, number, risk):
    assert (find_number(text), find_risk(text)) == (number, risk)


def test_there_are_many_forms_and_each_once():
    assert len(FORMS) == len({form[0] for form in FORMS}) > 150


def test_what_words_around_a_number_change():
    """A sentence around a plain number leaves it what it is; two different numbers in a sentence are none."""
    for around in (
        "It is {}.",
        "Answer: {}",
        "**{}**",
        "I think {} is right",
        "({})",
        "{}\n",
        "My estimate: {}!",
        "= {}",
    ):
        for number in ("7", "-7", "0.7", "1,234", "7e2", "$7"):
            assert find_number(around.format(number)) == find_number(number) is not None
        assert find_number(around.format("7 and 8")) is None and find_risk(around.format("0.7 and 0.8")) is None


@pytest.mark.parametrize(
    ("text", "with_comma", "with_point"),
    [("1,234", 1.234, 1234), ("1.234", 1234, 1.234), ("1.234,5", 1234.5, 1234.5), ("0,7", 0.7, 0.7), ("0.7", 0.7, 0.7),
     ("1.234.567", 1234567, 1234567), ("-1,234", -1.234, -1234), ("12,50", 12.5, 12.5)],
)  # fmt: skip
def test_what_can_be_read_in_two_ways(text, with_comma, with_point):
    assert (find_number(text, decimal_comma=True), find_number(text)) == (with_comma, with_point)


@pytest.mark.parametrize(
    ("texts", "comma"),
    [(["1,5", "3", "1,234"], True), (["1.234.567", "7"], True), (["1.234,50"], True), (["0,700"], True),
     (["1,5", "2.5"], False), (["1,234", "5,678"], False), (["$1,234.50"], False), (["1,234,567"], False), (["7"], False),
     ([], False)],
)  # fmt: skip
def test_whether_texts_have_decimal_commas(texts, comma):
    assert writes_decimal_comma(texts) is comma


def styles_of(value: float) -> list[str]:
    """A number with two decimals as people write it."""
    english = f"{value:,.2f}"
    grouped = [english.replace(",", mark) for mark in (" ", "\u202f", "'", "\u2019")]
    return [english, english.translate(str.maketrans(",.", ".,")), *grouped, f"{value:.2f}".replace(".", ",")]


def test_plain_numbers_come_back_as_they_were_written():
    draw = random.Random(0)
    for _ in range(2000):
        value = round(draw.choice((-1, 1)) * 10 ** draw.uniform(-4, 8), draw.randrange(5))
        assert find_number(repr(value)) == value and find_number(f"{value:.3e}") == float(f"{value:.3e}")
        for style in styles_of(value):
            assert find_number(style) == round(value, 2), style
            assert find_number(style.replace("-", "\u2212")) == round(value, 2), style


@pytest.mark.parametrize("piece", ["1 ", "3 to ", "(1,", "-", "1.", "a-", "$-"])
def test_a_long_text_takes_no_time(piece):
    """Twice the text takes about twice the time; were it four times, this would take a minute."""
    for find in (find_number, find_risk):
        assert find(piece * 10_000 + " and 7 or 0.7") is None
