"""Generate sanity checks: labels of bit sequences, and pairs whose input or output is predictable or random."""

import random

from cruijff_kit.data.generators.common import GeneratedData, draw_distinct, require, split_rows

_RUN = 5  # integers in an input of predictable_or_not
_ANSWER = "42"


def draw_bit_sequences(
    label: str = "parity",
    length: int = 10,
    num_rows: int = 500,
    p: float = 0.5,
    train_fraction: float = 0.8,
    seed: int = 0,
) -> GeneratedData:
    """Different sequences "0 1 1 0" and their parity, or a label that has nothing to do with them.

    Args:
        label: parity ("1" for an odd number of ones) or bernoulli ("1" with probability p).
        length: bits per sequence.
        num_rows: sequences in all, at most 2^length.
        p: of label=bernoulli.
        train_fraction: share of ``train``; what is left is halved.
        seed: of the draw.
    Raises:
        UserError: an argument out of range.
    """
    require(label in ("parity", "bernoulli"), f"label={label} does not exist; valid: parity, bernoulli")
    require(1 <= length <= 62, f"length must be from 1 to 62, not {length}")
    require(0 <= p <= 1, f"p must be from 0 to 1, not {p}")
    require(
        3 <= num_rows <= 2**length,
        f"num_rows must be from 3 to {2**length} (sequences of {length} bits), not {num_rows}",
    )
    rng = random.Random(seed)
    numbers = rng.sample(range(2**length), num_rows)
    rows = []
    for number in numbers:
        bit = number.bit_count() % 2 if label == "parity" else rng.random() < p
        rows.append({"input": " ".join(f"{number:0{length}b}"), "output": str(int(bit))})
    splits = split_rows(rows, train_fraction)
    best = 1.0 if label == "parity" else max(p, 1 - p)
    return GeneratedData(splits, {split: {"accuracy": best} for split in splits})


def task_of_bit_sequences(label: str, p: float, **_: object) -> str:
    """risk, unless there is one answer only."""
    return "risk" if label == "parity" or 0 < p < 1 else "match"


def draw_predictable_or_not(
    variant: str = "pp", num_rows: int = 1000, highest: int = 9999, train_fraction: float = 0.9, seed: int = 0
) -> GeneratedData:
    """Five integers, separated by commas, and an answer; either can be predictable or not.

    Args:
        variant: first the input, then the output: p predictable, u unpredictable. A predictable input is a run of
            consecutive integers, another one five drawn integers. A predictable output is the next integer (pp), or always
            42 (up); another one is drawn.
        num_rows: rows in all.
        highest: largest integer; the smallest is 1.
        train_fraction: share of ``train``; what is left is halved.
        seed: of the draw.
    Raises:
        UserError: an argument out of range.
    """
    require(variant in ("pp", "pu", "up", "uu"), f"variant={variant} does not exist; valid: pp, pu, up, uu")
    require(_RUN < highest <= 10**9, f"highest must be from {_RUN + 1} to 10^9, not {highest}")
    starts = highest - _RUN  # the next integer is not above `highest` either
    most = starts if variant[0] == "p" else highest**_RUN // 2
    require(3 <= num_rows <= most, f"num_rows must be from 3 to {most} with highest={highest}, not {num_rows}")
    rng = random.Random(seed)
    if variant[0] == "p":
        inputs = [list(range(s, s + _RUN)) for s in rng.sample(range(1, starts + 1), num_rows)]
    else:
        inputs = draw_distinct(lambda: [rng.randint(1, highest) for _ in range(_RUN)], num_rows, tuple, "num_rows")
    rows = []
    for run in inputs:
        answer = str(run[-1] + 1) if variant == "pp" else _ANSWER if variant == "up" else str(rng.randint(1, highest))
        rows.append({"input": ", ".join(map(str, run)), "output": answer})
    splits = split_rows(rows, train_fraction)
    best = 1.0 if variant[1] == "p" else 1 / highest
    return GeneratedData(splits, {split: {"accuracy": best} for split in splits})
