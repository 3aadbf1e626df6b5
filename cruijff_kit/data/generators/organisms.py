"""Model organisms: sequences of symbols under a known rule, to see what a fine-tune learns and what it memorises."""

import itertools
import random

from cruijff_kit.data.generators.common import GeneratedData, Rows, mean, require, split_rows
from cruijff_kit.data.generators.rules import ALPHABETS, RULES, Rule, RuleArguments, Sequence

FORMATS = {"spaced": " ", "dense": "", "comma": ",", "tab": "\t", "pipe": "|"}
DESIGNS = ("memorization", "in_distribution", "ood")
_ENUMERATED = 2**16  # sequences up to which the Bayes accuracy over all of them is worked out


def draw_model_organisms(
    rule: str = "parity",
    alphabet: str = "bits",
    format: str = "spaced",
    design: str = "in_distribution",
    k: int = 8,
    k_min: int | None = None,
    num_rows: int = 200,
    train_fraction: float = 0.8,
    seed: int = 0,
    ood_lengths: list[int] = (),  # type: ignore[assignment]  # never changed
    ood_rows: int = 100,
    n: int = 1,
    value: str = "1",
    p: float = 0.5,
    weight_max: int = 3,
    noise: float = 0.0,
    intercept: str | int = "balanced",
    weight_seed: int | None = None,
) -> GeneratedData:
    """Different sequences and the rule's answers.

    Args:
        rule: one of rules.RULES. parity (bits): 1 for an odd number of ones. majority: the symbol that stands most often,
            of several the smallest. first, last, nth: a symbol. length. constant. coin: 1 with probability p, fixed for
            each sequence. min, max (digits, letters). weighted_sum (bits, digits): sum of w x + intercept, a sign and
            digits with spaces between them. weighted_sum_binary: 1 where z = that sum is above 0; with noise, 1 with
            P = sigmoid(z / noise).
        alphabet: bits, digits or letters.
        format: what stands between symbols: spaced, dense (nothing), comma, tab, pipe.
        design: in_distribution: train, validation and test of different sequences. memorization: all three are the same
            rows. ood: as in_distribution, and a split validation_ood_0, ... for each of ood_lengths.
        k: symbols in a sequence; with k_min, from k_min to k of them.
        num_rows: sequences in all, without those of ood_lengths.
        train_fraction: share of ``train``; what is left is halved.
        seed: of sequences, weights and labels.
        ood_lengths, ood_rows: symbols in the sequences of design=ood's further splits, and how many of them.
        n, value, p, weight_max, noise, intercept: of the rules. n counts from 1; weights are whole numbers, not 0, from
            -weight_max to weight_max; intercept=balanced makes half of all sums positive.
        weight_seed: of weights and their noise; None: seed.
    Raises:
        UserError: an argument out of range, or fewer different sequences than rows.
    """
    for name, chosen, valid in (("rule", rule, RULES), ("alphabet", alphabet, ALPHABETS), ("format", format, FORMATS),
                                ("design", design, DESIGNS)):  # fmt: skip
        require(chosen in valid, f"{name}={chosen} does not exist; valid: {', '.join(valid)}")
    k_min = k if k_min is None else k_min
    require(1 <= k_min <= k <= 1000, f"k={k}, k_min={k_min}: 1 <= k_min <= k <= 1000 must hold")
    _check_ood(design, rule, n, k_min, k, [*ood_lengths])
    generated_rule = RULES[rule](RuleArguments(alphabet, k, k_min, n, value, p, weight_max, noise, intercept, seed,
                               seed if weight_seed is None else weight_seed))  # fmt: skip
    rng, symbols = random.Random(f"sequences {seed}"), ALPHABETS[alphabet]
    sequences = _sequences(rng, len(symbols), range(k_min, k + 1), num_rows, "num_rows")
    if design == "memorization":
        parts = dict.fromkeys(("train", "validation", "test"), sequences)
    else:
        parts = split_rows(sequences, train_fraction)
        for i, length in enumerate(ood_lengths):
            parts[f"validation_ood_{i}"] = _sequences(rng, len(symbols), [length], ood_rows, "ood_rows")
    splits = {split: _rows(part, generated_rule, symbols, FORMATS[format]) for split, part in parts.items()}
    # What is trained on can be known by heart, also where the rule draws lots.
    best = {
        s: 1.0 if design == "memorization" else mean([generated_rule.chance(x) for x in part])
        for s, part in parts.items()
    }
    facts = generated_rule.facts | _bayes_over_all(generated_rule, len(symbols), range(k_min, k + 1))
    return GeneratedData(splits, {s: {"accuracy": a} for s, a in best.items()}, facts, repeats=design == "memorization")


def task_of_model_organisms(rule: str, alphabet: str, p: float, **_: object) -> str:
    """risk where the answers are 0 and 1."""
    has_random_answers = rule == "coin" and 0 < p < 1
    is_position_of_bits = rule in ("majority", "first", "last", "nth") and alphabet == "bits"
    return "risk" if rule in ("parity", "weighted_sum_binary") or has_random_answers or is_position_of_bits else "match"


def _check_ood(design: str, rule: str, n: int, k_min: int, k: int, lengths: list[int]) -> None:
    require(
        bool(lengths) == (design == "ood"), f"ood_lengths={lengths} with design={design}: lengths go with design=ood"
    )
    require(len(set(lengths)) == len(lengths), f"ood_lengths={lengths} names a length twice")
    for length in lengths:
        require(1 <= length <= 1000, f"ood_lengths={lengths}: lengths go from 1 to 1000")
        require(not k_min <= length <= k, f"ood_lengths={lengths} holds {length}, which is trained on (k_min to k)")
        require(rule != "nth" or length >= n, f"ood_lengths={lengths} holds {length}, which has no place n={n}")
        require(not rule.startswith("weighted"), f"design=ood: rule={rule} has weights for k={k} symbols alone")


def _sequences(rng: random.Random, size: int, lengths, count: int, name: str) -> list[Sequence]:
    """Different sequences, as many of each length as there are, as evenly as can be; in drawn order."""
    room = {length: size**length for length in lengths}
    require(count >= 3, f"{name} must be at least 3, not {count}")
    require(count <= sum(room.values()),
            f"{name}={count} is too many: there are {sum(room.values())} sequences of {'/'.join(map(str, room))} symbols; "
            "raise k, or lower it")  # fmt: skip
    sequences, remaining = [], count
    for i, (length, available) in enumerate(sorted(room.items())):
        quota = min(available, remaining // (len(room) - i))
        sequences += [_decode(number, size, length) for number in _numbers(rng, available, quota)]
        remaining -= quota
    rng.shuffle(sequences)
    return sequences


def _numbers(rng: random.Random, below: int, count: int) -> list[int]:
    if below <= 2**62:
        return rng.sample(range(below), count)
    return [*dict.fromkeys(rng.randrange(below) for _ in range(count + 10))][:count]


def _decode(number: int, size: int, length: int) -> Sequence:
    digits = []
    for _ in range(length):
        number, digit = divmod(number, size)
        digits.append(digit)
    return tuple(digits)


def _rows(sequences: list[Sequence], rule: Rule, symbols: str, between: str) -> Rows:
    return [{"input": between.join(symbols[i] for i in s), "output": rule.answer(s)} for s in sequences]


def _bayes_over_all(rule: Rule, size: int, lengths) -> dict[str, float]:
    """Bayes accuracy over all sequences, each as likely, where they are few enough to go through them."""
    if sum(size**length for length in lengths) > _ENUMERATED:
        return {}
    everything = (s for length in lengths for s in itertools.product(range(size), repeat=length))
    return {"bayes_accuracy": mean([rule.chance(s) for s in everything])}
