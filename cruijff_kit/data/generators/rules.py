"""The rules of model organisms: from a sequence of symbols to the answer, and to the best accuracy on it.

Sequences are tuples of indices into the alphabet. A rule is made once per data set, with all that is drawn for it.
"""

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cruijff_kit.data.generators.common import require, sigmoid

ALPHABETS = {"bits": "01", "digits": "0123456789", "letters": "abcdefghijklmnopqrstuvwxyz"}
Sequence = tuple[int, ...]


@dataclass(frozen=True)
class RuleArguments:
    """Arguments of all rules; each rule reads those that it needs."""

    alphabet: str
    """Name of the alphabet: bits, digits or letters."""
    k: int
    """Maximum number of symbols in a sequence."""
    k_min: int
    """Minimum number of symbols in a sequence."""
    n: int
    """Position of the symbol that rule=nth returns, counted from 1."""
    value: str
    """Answer of rule=constant."""
    p: float
    """P(answer = 1) of rule=coin."""
    weight_max: int
    """Largest absolute value of a weight of the weighted sums."""
    noise: float
    """Scale of the noise of rule=weighted_sum_binary: P(answer = 1) = sigmoid(sum / noise); 0: no noise."""
    intercept: str | int
    """Intercept of the weighted sums: a whole number, or balanced: half of all sums are positive."""
    seed: int
    """Seed of the answers of rule=coin."""
    weight_seed: int
    """Seed of the weights and of the noise."""

    @property
    def symbols(self) -> str:
        """The alphabet's symbols; a symbol's index is its number."""
        return ALPHABETS[self.alphabet]


@dataclass(frozen=True)
class Rule:
    """A rule from a sequence to an output."""

    answer: Callable[[Sequence], str]
    """sequence -> output."""
    chance: Callable[[Sequence], float] = lambda s: 1.0
    """sequence -> P(the likeliest output); 1 if it is certain."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Random quantities of the rule: weights, intercept."""


def _parity(c: RuleArguments) -> Rule:
    require(c.alphabet == "bits", f"rule=parity takes alphabet=bits, not {c.alphabet}")
    return Rule(lambda s: str(sum(s) % 2))


def _majority(c: RuleArguments) -> Rule:
    def most(s: Sequence) -> str:
        counts = Counter(s)
        return c.symbols[min(counts, key=lambda i: (-counts[i], i))]  # of equally many the smallest

    return Rule(most)


def _nth(c: RuleArguments) -> Rule:
    require(1 <= c.n <= c.k_min, f"n={c.n} is no position in sequences of {c.k_min} symbols; count from 1")
    return Rule(lambda s: c.symbols[s[c.n - 1]])


def _length(c: RuleArguments) -> Rule:
    require(c.k_min < c.k, f"rule=length has one answer where all sequences have k={c.k} symbols; set k_min below it")
    return Rule(lambda s: str(len(s)))


def _constant(c: RuleArguments) -> Rule:
    require(c.value.strip() != "", "value is empty; rule=constant answers with it")
    return Rule(lambda s: c.value)


def _coin(c: RuleArguments) -> Rule:
    require(0 <= c.p <= 1, f"p must be from 0 to 1, not {c.p}")
    return Rule(lambda s: str(int(_uniform(c.seed, s) < c.p)), lambda s: max(c.p, 1 - c.p))


def _ordered(c: RuleArguments, pick: Callable) -> Rule:
    require(c.alphabet != "bits", "rule=min and rule=max take alphabet=digits or letters, not bits")
    return Rule(lambda s: c.symbols[pick(s)])


def _weights(c: RuleArguments) -> tuple[list[int], int]:
    require(c.alphabet != "letters", "rule=weighted_sum takes alphabet=bits or digits: letters have no values")
    require(c.k_min == c.k, f"rule=weighted_sum has a weight for each of k={c.k} symbols; leave k_min out")
    require(1 <= c.weight_max <= 1000, f"weight_max must be from 1 to 1000, not {c.weight_max}")
    rng = random.Random(f"('weighted_sum:weights', {c.weight_seed})")  # v1's stream: the same seed, the same weights
    weights = [rng.choice([w for w in range(-c.weight_max, c.weight_max + 1) if w]) for _ in range(c.k)]
    if isinstance(c.intercept, int):
        return weights, c.intercept
    require(c.intercept == "balanced", f"intercept={c.intercept} is neither balanced nor a whole number")
    return weights, round(-sum(weights) * (len(c.symbols) - 1) / 2)


def _sum(weights: list[int], intercept: int) -> Callable[[Sequence], int]:
    return lambda s: sum(w * x for w, x in zip(weights, s, strict=True)) + intercept


def _weighted_sum(c: RuleArguments) -> Rule:
    require(c.noise == 0, f"noise={c.noise}: rule=weighted_sum has none; rule=weighted_sum_binary has")
    weights, intercept = _weights(c)
    z = _sum(weights, intercept)
    # A sign and as many digits as the largest sum has, each a token of its own.
    width = 1 + len(str(sum(map(abs, weights)) * (len(c.symbols) - 1) + abs(intercept)))
    return Rule(lambda s: " ".join(f"{z(s):+0{width}d}"), facts={"weights": weights, "intercept": intercept})


def _weighted_sum_binary(c: RuleArguments) -> Rule:
    require(c.noise >= 0, f"noise must be at least 0, not {c.noise}")
    weights, intercept = _weights(c)
    z, facts = _sum(weights, intercept), {"weights": weights, "intercept": intercept}
    if c.noise == 0:
        return Rule(lambda s: str(int(z(s) > 0)), facts=facts)
    return Rule(
        lambda s: str(int(_uniform(c.weight_seed, s) < sigmoid(z(s) / c.noise))),
        lambda s: sigmoid(abs(z(s)) / c.noise),
        facts,
    )


def _uniform(seed: int, s: Sequence) -> float:
    """Return a number in [0, 1) that depends on the seed and the sequence alone."""
    return random.Random(f"{seed} {s}").random()


RULES: dict[str, Callable[[RuleArguments], Rule]] = {
    "parity": _parity,
    "majority": _majority,
    "first": lambda c: Rule(lambda s: c.symbols[s[0]]),
    "last": lambda c: Rule(lambda s: c.symbols[s[-1]]),
    "nth": _nth,
    "length": _length,
    "constant": _constant,
    "coin": _coin,
    "min": lambda c: _ordered(c, min),
    "max": lambda c: _ordered(c, max),
    "weighted_sum": _weighted_sum,
    "weighted_sum_binary": _weighted_sum_binary,
}
