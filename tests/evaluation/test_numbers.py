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
    # Ratios in words, and what is none
    ("1 in four", None, None), ("1 in a million", None, None), ("7 out of ten", None, None),
    ("1 person in four", None, None),
    ("80% of 200 people", None, None), ("80% in 2020", None, None), ("0.3 in 2020", None, None), ("10% of 50", None, None),
    ("5 in 2020", None, None), ("0% of 200", None, None), ("05/07", None, None), ("3/2020", None, None),
    ("1 in 2000", None, 0.0005), ("1 in 4 people", None, 0.25), ("7.5/10", None, 0.75), ("0.5 of 1 percent", None, None),
    # Bounds and negations
    ("<=5", None, None), ("<= 5", None, None), (">= 0.7", None, None), ("\u22665", None, None), ("max 5", None, None),
    ("minimum 5", None, None), ("5 or more", None, None), ("5 or less", None, None), ("5, or less", None, None),
    ("5 (or more)", None, None), ("5 years or more", None, None), ("5 max", None, None), ("5, at most", None, None),
    ("5 and up", None, None), ("Maximum: 5", None, None), ("The minimum is 5", None, None), ("up to about 5", None, None),
    ("less than **5**", None, None), ("at least\n5", None, None), ("n\xe3o 5", None, None), ("h\xf6chstens 5", None, None),
    ("not **5**", None, None), ("It isn't 5", None, None), ("I do not think it is 5", None, None), ("not (5)", None, None),
    ("less than five (5)", None, None), ("x != 5", None, None), ("x \u2260 5", None, None), ("5 is too high", None, None),
    ("5 is not right", None, None), ("=> 5", None, None), ("barely 5", None, None), ("5\u2264", None, None),
    # Signs
    ("+-5", None, None), ("-+5", None, None), ("\u207b5", None, None), ("(5,000)", None, None), ("($5)", None, None),
    ("5,000-", None, None), ("5 -", None, None), ("\ufffd5", None, None),
    ("-(5)", None, None), ("minus -5", None, None), ("|-5|", None, None),
    ("5,-", None, None), ("(USD 5)", None, None),
    # Other notations of numbers
    ("1 e5", None, None), ("1.5 e3", None, None), ("1 E 5", None, None), ("+49 170", None, None), ("5 squared", None, None),
    ("5 times", None, None), ("5 per mille", None, None), ("5 fois", None, None), ("5 miljoen", None, None),
    ("5 thousandths", None, None), ("5 eighths", None, None), ("5 tens", None, None), ("0.(3)", None, None),
    ("\uff11\uff0e\uff11", None, None), ("1;1", None, None), ("1 1", None, None), ("3. 3", None, None),
    ("5, 5", None, None),
    ("x * 5", None, None), ("x*5", None, None), ("x\xb75", None, None), ("sqrt(5)", None, None), ("log 5", None, None),
    ("\\sqrt{5}", None, None), ("\\frac{5}{5}", None, None), ("10^{5}", None, None), ("5\u2082", None, None),
    ("5 bps", None, None), ("5 basis points", None, None), ("0.5 thousand", 500, None), ("two\n5", None, None),
    ("5 thousand million", None, None), ("1\u066b5", None, None), ("(in thousands): 5", None, None),
    ("5 - ten", None, None),
    # Dates, times, labels, lists
    ("Mai 5", None, None), ("5 mai", None, None), ("5. Mai", None, None), ("Datum: 5. Mai", None, None),
    ("le 5 ao\xfbt", None, None), ("5 in the morning", None, None), ("at 5", None, None), ("Sept. 5", None, None),
    ("page 5", None, None), ("No. 5", None, None), ("#5", None, None), ("\xa75", None, None), ("top 5", None, None),
    ("1. The risk is high", None, None), ("(1) The risk is high", None, None), ("1) high", None, None),
    ("The risk is high [1]", None, None), ("5th", None, None), ("the 5th", None, None), ("5\xba", None, None),
    ("5 minutes past six", None, None), ("5 h 30", None, None), ("7, or 8", None, None), ("seven or 8", None, None),
    ("5 or six", None, None), ("class 1", None, None), ("5 years ago", None, None),
    # What a risk is not
    ("1 person", 1, None), ("0.5 kg", 0.5, None), ("$0.5", 0.5, None), ("Percentage: 0.5", 0.5, None),
    ("Risk (%): 1", 1, None), ("0.5 (%)", None, None), ("**0.5**%", None, None), ("0.5\\%", 0.5, 0.005),
    ("1 of them", 1, None), ("80% less likely", None, None),
    # What stays what it is
    ("0.7 (70%)", None, 0.7), ("1.234.567,8", 1234567.8, None), ("1'000", 1000, None), ("3 million", 3e6, None),
    ("\uff15", 5, None), ("\uff10.7", 0.7, 0.7), ("\u096b", 5, None), ("Answer: 5", 5, None), ("$5$", 5, None),
    ("$0.7$", 0.7, 0.7), ("$\\boxed{5}$", 5, None), ("\\(5\\)", 5, None), ("**Answer:** 5", 5, None), ("**5.**", 5, None),
    ("#### 5", 5, None), ("| 5 |", 5, None), ("[[5]]", 5, None), ("5!", 5, None), ("5?", 5, None), ("US$5", 5, None),
    ("5 apples", 5, None), ("She has 5 apples left.", 5, None), ("It costs 5 dollars per hour.", 5, None),
    ("7 years old", 7, None), ("60 miles per hour", 60, None), ("USD 5", 5, None), ("5 \u20ac", 5, None),
    ("5 euros", 5, None),
    ("I'd say 7.", 7, None), ("My best guess is about 0.35.", 0.35, 0.35), ("There is a 35% chance of that.", 35, 0.35),
    ("I am 70% sure", 70, 0.7), ("80% of the time", 80, 0.8), ("a risk of 0.3", 0.3, 0.3),
    ("I put the risk at 0.7", 0.7, 0.7),
    ("It is most likely 5", 5, None), ("0.7 because it is not clear", 0.7, 0.7), ("0.7, as they are not old", 0.7, 0.7),
    ("The person is not employed: 0.3", 0.3, 0.3), ("Yes, 0.7", 0.7, 0.7), ("Sure. 0.7", 0.7, 0.7),
    ("No, I think 5", 5, None),
    ("7 on a scale of 0 to 10", 7, None), ("equal to 5", 5, None), ("Die Antwort ist 5", 5, None),
    ("La r\xe9ponse est 5", 5, None), ("etwa 5 Jahre", 5, None), ("ca. 5", 5, None), ("5 or so", 5, None),
    ("risk=0.25", 0.25, 0.25), ("{'risk':0.25}", 0.25, 0.25), ("5\n\nBecause of May.", 5, None),
    ("1 in 4, or 0.25", None, 0.25),
    ("She earns $50,000 a year", 50000, None), ("-3 \xb0C", -3, None), ("0.1<|im_end|>", 0.1, 0.1), ("0.1</s>", 0.1, 0.1),
    ("A chance of one in ten, so 0.1", 0.1, 0.1), ("I give 0.7 to this person.", 0.7, 0.7), ("0,7 ist es", 0.7, 0.7),
    ("alrededor de 5", 5, None), ("In my opinion 0.7", 0.7, 0.7), ("Probability of default: 0.35", 0.35, 0.35),
    ("5 is the minimum", None, None), ("5 as a minimum", None, None), ("5 but not six", None, None),
    ("Log odds: 0.5", 0.5, None), ("per mille: 0.5", 0.5, None), ("the odds are 0.5", 0.5, None), ("( 5,000 )", None, None),
    ("5 (-)", None, None), ("(-) 5", None, None), ("It isn't going to be 5", None, None), ("less: 5", None, None),
    ("5 (x1000)", None, None), ("il y a 5 personnes", 5, None), ("It may be 5", 5, None),
    ("The answer is 5. The reason is clear.", 5, None), ("0.7. The reason is clear.", 0.7, 0.7),
]  # fmt: skip


@pytest.mark.parametrize(("text", "number", "risk"), FORMS, ids=[ascii(form[0]) for form in FORMS])
def test_a_form(text, number, risk):
    assert (find_number(text), find_risk(text)) == (number, risk)


def test_there_are_many_forms_and_each_once():
    assert len(FORMS) == len({form[0] for form in FORMS}) > 300


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
            if around == "({})" and number in ("1,234", "$7"):  # accountants' minus
                assert find_number(around.format(number)) is None
                continue
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
