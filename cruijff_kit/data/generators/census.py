"""A synthetic census: people described in words, and their income, or whether it is high, under a known rule.

Nobody in it is real. A person's attributes are drawn independently; SCORES says how each moves the log-odds of a high
income (target=binary, a logistic rule) and, by DOLLARS a unit, the income itself (target=continuous, a linear rule with
noise).
"""

import random
from collections.abc import Callable
from typing import Any

from cruijff_kit.data.generators.common import (
    GeneratedData,
    bayes_accuracy,
    draw_distinct,
    mean,
    require,
    sigmoid,
    split_rows,
)

EDUCATION = ("no high school diploma", "a high school diploma", "some college", "a bachelor's degree",
             "a master's degree", "a doctorate")  # fmt: skip
OCCUPATION = ("farm worker", "cleaner", "sales clerk", "mechanic", "office manager", "nurse", "engineer", "lawyer")
MARITAL = ("never married", "married", "divorced", "widowed")
SEX = ("male", "female")
AGES = ((18, 29), (30, 44), (45, 59), (60, 80))
HOURS = (20, 25, 30, 35, 40, 45, 50, 55, 60)

INTERCEPT = -0.6
SCORES: dict[str, Any] = {
    "age": "0.04 for each year up to 60, counted from 40",
    "education": dict(zip(EDUCATION, (-1.6, -0.8, -0.2, 0.8, 1.4, 1.9), strict=True)),
    "occupation": dict(zip(OCCUPATION, (-1.2, -1.0, -0.5, -0.1, 0.5, 0.4, 1.1, 1.4), strict=True)),
    "marital": dict(zip(MARITAL, (-0.4, 0.5, 0.0, -0.1), strict=True)),
    "sex": dict(zip(SEX, (0.2, -0.2), strict=True)),
    "hours": "0.05 for each hour a week, counted from 40",
}
"""Attribute -> its contribution to the score; the log-odds of a high income are INTERCEPT + score."""
MEAN_DOLLARS, DOLLARS, NOISE_DOLLARS = 90_000, 10_000, 8_000
"""Income = MEAN_DOLLARS + DOLLARS x (INTERCEPT + score) + a normal draw with this standard deviation."""

Person = dict[str, Any]
WORDINGS = ("verbose", "condensed", "terse")
TARGETS = ("binary", "continuous")
_QUESTIONS = {
    "binary": "Is this person's yearly income above $90,000? Answer 1 for yes and 0 for no.",
    "continuous": "What is this person's yearly income in dollars? Answer with a number.",
}


def draw_census(
    wording: str = "verbose",
    target: str = "binary",
    num_rows: int = 1000,
    noise: float = 1.0,
    train_fraction: float = 0.8,
    seed: int = 0,
) -> GeneratedData:
    """People in words and the answer, "1" or "0", or dollars in whole hundreds; columns beside them name their groups.

    Args:
        wording: verbose ("- The age is: 51 years old.", with the question), condensed ("AGE: 51 | ..."), or terse
            ("AGE:51|..."). The same seed draws the same people and answers in each.
        target: binary or continuous.
        num_rows: people in all, no two alike.
        noise: how far chance goes. binary: P(1) = sigmoid(log-odds / noise), 0: certain. continuous: times NOISE_DOLLARS.
        train_fraction: share of ``train``; what is left is halved.
        seed: of the draw.
    Raises:
        UserError: an argument out of range.
    """
    require(wording in WORDINGS, f"wording={wording} does not exist; valid: {', '.join(WORDINGS)}")
    require(target in TARGETS, f"target={target} does not exist; valid: {', '.join(TARGETS)}")
    require(0 <= noise <= 5, f"noise must be from 0 to 5, not {noise}")
    require(3 <= num_rows <= 100_000, f"num_rows must be from 3 to 100000, not {num_rows}")
    rng = random.Random(seed)
    people = draw_distinct(lambda: _person(rng), num_rows, lambda p: tuple(p.values()), "num_rows")
    answers = [_answer(rng, p, target, noise) for p in people]
    worded = _WORDED[wording]
    rows = [{"input": worded(p, target), "output": a, **groups_of(p)} for p, a in zip(people, answers, strict=True)]
    order = split_rows([*range(num_rows)], train_fraction)
    bayes_optimum = {split: _bayes_optimum([people[i] for i in part], [answers[i] for i in part], target, noise)
               for split, part in order.items()}  # fmt: skip
    facts = {"intercept": INTERCEPT, "scores": SCORES}
    return GeneratedData({split: [rows[i] for i in part] for split, part in order.items()}, bayes_optimum, facts)


def task_of_census(target: str, **_: object) -> str:
    """risk for the labels 0 and 1, number for dollars."""
    return "number" if target == "continuous" else "risk"


def log_odds(person: Person) -> float:
    """INTERCEPT + score of a person."""
    words = sum(SCORES[name][person[name]] for name in ("education", "occupation", "marital", "sex"))
    return INTERCEPT + words + 0.04 * (min(person["age"], 60) - 40) + 0.05 * (person["hours"] - 40)


def groups_of(person: Person) -> dict[str, str]:
    """Return the columns beside input and output: sex, age_group (18-29, ... 60-80), education, occupation, marital."""
    ages = next(f"{low}-{high}" for low, high in AGES if person["age"] <= high)
    return {"sex": person["sex"], "age_group": ages} | {k: person[k] for k in ("education", "occupation", "marital")}


def _person(rng: random.Random) -> Person:
    return {
        "age": rng.randint(18, 80),
        "education": rng.choice(EDUCATION),
        "occupation": rng.choice(OCCUPATION),
        "marital": rng.choice(MARITAL),
        "sex": rng.choice(SEX),
        "hours": rng.choice(HOURS),
    }


def _chance(person: Person, noise: float) -> float:
    """P(high income)."""
    z = log_odds(person)
    return sigmoid(z / noise) if noise else float(z > 0)


def _answer(rng: random.Random, person: Person, target: str, noise: float) -> str:
    if target == "binary":
        return str(int(rng.random() < _chance(person, noise)))
    dollars = MEAN_DOLLARS + DOLLARS * log_odds(person) + rng.gauss(0, 1) * NOISE_DOLLARS * noise
    return str(max(0, round(dollars / 100) * 100))


def _bayes_optimum(people: list[Person], answers: list[str], target: str, noise: float) -> dict[str, float]:
    """Return metric -> Bayes-optimal value: Bayes accuracy (binary), or errors of the expected income (continuous)."""
    if target == "binary":
        return {"accuracy": bayes_accuracy([_chance(p, noise) for p in people])}
    incomes = [float(a) for a in answers]
    errors = [i - (MEAN_DOLLARS + DOLLARS * log_odds(p)) for p, i in zip(people, incomes, strict=True)]
    centre = sum(incomes) / len(incomes)
    spread = sum((i - centre) ** 2 for i in incomes)
    return {
        "mae": mean([abs(e) for e in errors]),
        "rmse": round(mean([e * e for e in errors]) ** 0.5, 6),
        "r_squared": round(1 - sum(e * e for e in errors) / spread, 6) if spread else 0.0,
    }


def _verbose(p: Person, target: str) -> str:
    lines = [
        "The following describes a person who answered a census.",
        f"- The age is: {p['age']} years old.",
        f"- The highest education is: {p['education']}.",
        f"- The occupation is: {p['occupation']}.",
        f"- The marital status is: {p['marital']}.",
        f"- The sex is: {p['sex']}.",
        f"- The usual hours of work are: {p['hours']} a week.",
        _QUESTIONS[target],
    ]
    return "\n".join(lines)


def _condensed(p: Person, target: str) -> str:
    fields = [f"AGE: {p['age']}", f"EDUCATION: {p['education']}", f"OCCUPATION: {p['occupation']}",
              f"MARITAL STATUS: {p['marital']}", f"SEX: {p['sex']}", f"HOURS: {p['hours']}"]  # fmt: skip
    return " | ".join(fields)


def _terse(p: Person, target: str) -> str:
    # Numbers stand for levels of education, letters for the rest, as in a codebook.
    codes = "FCSMONEL"[OCCUPATION.index(p["occupation"])]
    married, sex = "NMDW"[MARITAL.index(p["marital"])], p["sex"][0].upper()
    return f"AGE:{p['age']}|EDU:{EDUCATION.index(p['education'])}|OCC:{codes}|MAR:{married}|SEX:{sex}|HRS:{p['hours']}"


_WORDED: dict[str, Callable[[Person, str], str]] = {"verbose": _verbose, "condensed": _condensed, "terse": _terse}
