"""Generated data: seeded, disjoint, worded and named as in v1, with Bayes optima that are what they say."""

import json
import math
import random
from pathlib import Path

import pytest

import cruijff_kit
from cruijff_kit.data.generators import GENERATORS, generate, generated_path, read_bayes_optimum, word_list
from cruijff_kit.data.generators.census import log_odds
from cruijff_kit.data.generators.common import sigmoid
from cruijff_kit.data.generators.rules import ALPHABETS, RULES
from cruijff_kit.util.errors import UserError


def test_word_list():
    words = word_list()
    assert len({w for w in words if len(w) == 5}) >= 1000
    assert len(set(words)) == len(words) and all(w.isascii() and w.isalpha() and w.islower() for w in words)


@pytest.mark.parametrize(
    ("arguments", "name", "sizes"),
    [
        ({}, "words_5L_80P_1000.json", (800, 100, 100)),
        ({"word_length": 7, "num_words": 99, "train_fraction": 0.7}, "words_7L_70P_99.json", (69, 15, 15)),
        ({"num_words": 10, "train_fraction": 0.5, "seed": 4}, "words_5L_50P_10.json", (5, 2, 3)),
    ],
)
def test_capitalization(arguments, name, sizes):
    path = generate("capitalization", arguments)
    assert path.name == name
    splits = json.loads(path.read_text())
    assert tuple(map(len, splits.values())) == sizes and list(splits) == ["train", "validation", "test"]
    rows = [row for split in splits.values() for row in split]
    assert len({row["input"] for row in rows}) == len(rows), "a word stands in two splits or twice in one"
    length = arguments.get("word_length", 5)
    assert all(r["output"] == r["input"].capitalize() and len(r["input"]) == length for r in rows)


def test_same_arguments_same_file_other_seed_other_words():
    one, again = generate("capitalization", {"seed": 1}), generate("capitalization", {"seed": 1})
    other = generate("capitalization", {"seed": 2})
    assert one == again and one.read_text() != other.read_text()
    assert generated_path("capitalization", {}) == generated_path("capitalization", {"word_length": 5})


@pytest.mark.parametrize(
    ("generator", "arguments", "says"),
    [
        ("capitalisation", {}, "did you mean capitalization?"),
        ("capitalization", {"word_lenght": 5}, "unknown key dataset.arguments.word_lenght; did you mean word_length?"),
        ("capitalization", {"word_length": "five"}, "must be of type int, not 'five'"),
        ("capitalization", {"num_words": 1.5}, "must be of type int, not 1.5"),
        ("capitalization", {"num_words": 10_000}, "the words of 5 letters"),
        ("capitalization", {"word_length": 30}, "dataset.arguments.word_length must be from 3 to 9"),
        ("capitalization", {"train_fraction": 1.0}, "must be between 0 and 1"),
        ("capitalization", {"num_words": 4, "train_fraction": 0.1}, "leaves a split empty"),
    ],
)
def test_refusals(generator, arguments, says):
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        generate(generator, arguments)


def draw(generator: str, **arguments):
    return GENERATORS[generator].draw(**arguments)


def rows_of(drawn) -> list[tuple[str, str]]:
    return [(row["input"], row["output"]) for rows in drawn.splits.values() for row in rows]


EVERY = [
    ("capitalization", {"other_lengths": [4, 7]}),
    ("synthetic_twins", {"num_rows": 100}),
    ("bit_sequences", {}),
    ("bit_sequences", {"label": "bernoulli", "p": 0.3}),
    *(("predictable_or_not", {"variant": v}) for v in ("pp", "pu", "up", "uu")),
    ("model_organisms", {"design": "ood", "ood_lengths": [9, 12]}),
    ("model_organisms", {"alphabet": "digits", "format": "comma", "rule": "max", "k_min": 3, "k": 5}),
    *(
        ("census", {"wording": w, "target": t})
        for w in ("verbose", "condensed", "terse")
        for t in ("binary", "continuous")
    ),
]


@pytest.mark.parametrize(("generator", "arguments"), EVERY, ids=str)
def test_seeded_and_disjoint(generator, arguments):
    one, again = draw(generator, **arguments), draw(generator, **arguments)
    other = draw(generator, **arguments, seed=1)
    assert one == again and one.splits != other.splits
    inputs = [i for i, _ in rows_of(one)]
    assert len(set(inputs)) == len(inputs), "an input stands twice"
    assert {"train", "validation", "test"} <= set(one.splits) and set(one.bayes_optimum) == set(one.splits)


# But for those that take the user's own data.
SHIPPED = sorted({p.stem for p in (Path(__file__).parents[2] / "conf/dataset").glob("*.yaml")} - {"files", "json"})


@pytest.mark.parametrize("name", SHIPPED)
def test_every_data_set_that_ships_can_run(name, tiny, tmp_path):
    """Its conf composes, names every argument of its generator, chooses a task, and passes every check before training."""
    import inspect

    from cruijff_kit.runs.plan import plan_run

    where = ["model=hf_llama", f"model.path={tiny}", "device=cpu", f"output_dir={tmp_path / 'run'}"]
    long = {"synthetic_twins": ["dataset.arguments.traits=6"], "census": ["dataset.arguments.wording=terse"]}
    config = cruijff_kit.compose([f"dataset={name}", *where, *long.get(name, [])])
    known = inspect.signature(GENERATORS[config.dataset.generator].draw).parameters
    assert set(config.dataset.arguments) == set(known)
    plan = plan_run(config)
    assert config.eval.tasks and all(plan.prompts_checked[task] > 0 for task in config.eval.tasks)
    assert not (tmp_path / "run").exists()
    chosen = read_bayes_optimum(config.dataset.generator, config.dataset.arguments, config.dataset.test_split)
    assert 0 < chosen["accuracy"] <= 1


def test_what_lies_beside_the_file():
    path = generate("model_organisms", {"rule": "weighted_sum_binary", "noise": 1.0})
    meta = json.loads((path.parent / "model_organisms.meta.json").read_text())
    assert meta["generator"] == "model_organisms" and meta["arguments"]["noise"] == 1.0 and meta["arguments"]["k"] == 8
    assert meta["rows"] == {"train": 160, "validation": 20, "test": 20} and len(meta["facts"]["weights"]) == 8
    assert set(json.loads(path.read_text())) == {"train", "validation", "test"}
    assert read_bayes_optimum(None, {}, "test") == {} == read_bayes_optimum("model_organisms", {"seed": 99}, "test")


def test_other_lengths_of_words():
    splits = draw("capitalization", other_lengths=[4, 7], other_words=20).splits
    assert [len(splits[s]) for s in ("train", "test_4L", "test_7L")] == [800, 20, 20]
    assert {len(r["input"]) for r in splits["test_7L"]} == {7}
    assert splits["train"] == draw("capitalization").splits["train"], "the words that are trained on stay"


# By hand: the answers of every rule on sequences that are spelled out.
RULED = [
    ("parity", {}, {"0 1 1 0": "0", "1 1 1 0": "1", "0 0 0 0": "0"}),
    ("majority", {}, {"0 1 1 0": "0", "1 1 1 0": "1", "0 0 0 1": "0"}),
    ("first", {}, {"0 1 1 1": "0", "1 0 0 0": "1"}),
    ("last", {}, {"0 1 1 1": "1", "1 0 0 0": "0"}),
    ("nth", {"n": 2}, {"0 1 0 0": "1", "1 0 1 1": "0"}),
    ("length", {"k_min": 2}, {"0 1": "2", "1 0 1": "3", "0 0 0 0": "4"}),
    ("constant", {"value": "yes"}, {"0 1 1 0": "yes", "1 1 1 1": "yes"}),
    ("min", {"alphabet": "digits", "k": 2}, {"3 7": "3", "9 9": "9", "5 0": "0"}),
    ("max", {"alphabet": "letters", "k": 2}, {"c g": "g", "z a": "z"}),
]


@pytest.mark.parametrize(("rule", "arguments", "answers"), RULED, ids=str)
def test_rules(rule, arguments, answers):
    k = arguments.get("k", 4)
    symbols = len(ALPHABETS[arguments.get("alphabet", "bits")])
    every = sum(symbols**n for n in range(arguments.get("k_min", k), k + 1))
    drawn = draw("model_organisms", rule=rule, num_rows=every, **{"k": 4} | arguments)
    found = dict(rows_of(drawn))
    assert len(found) == every and {s: found[s] for s in answers} == answers
    assert drawn.bayes_optimum["test"] == {"accuracy": 1.0}


def test_every_rule_is_tested():
    assert {r for r, *_ in RULED} | {"coin", "weighted_sum", "weighted_sum_binary"} == set(RULES)


@pytest.mark.parametrize(
    "name, between", [("dense", ""), ("comma", ","), ("tab", "\t"), ("pipe", "|"), ("spaced", " ")]
)
def test_formats_word_the_same_sequences(name, between):
    spaced = rows_of(draw("model_organisms"))
    assert rows_of(draw("model_organisms", format=name)) == [(i.replace(" ", between), o) for i, o in spaced]


def test_weighted_sums():
    drawn = draw("model_organisms", rule="weighted_sum", alphabet="digits", k=3, intercept=5)
    weights = drawn.facts["weights"]
    assert all(w and abs(w) <= 3 for w in weights) and drawn.facts["intercept"] == 5
    for asked, answer in rows_of(drawn):
        assert int(answer.replace(" ", "")) == 5 + sum(w * int(x) for w, x in zip(weights, asked.split(), strict=True))
    assert {len(answer) for _, answer in rows_of(drawn)} == {5}, "a sign and two digits, spaces between them"
    certain = draw("model_organisms", rule="weighted_sum_binary", num_rows=256)
    weights, intercept = certain.facts["weights"], certain.facts["intercept"]
    for asked, answer in rows_of(certain):
        z = intercept + sum(w * int(x) for w, x in zip(weights, asked.split(), strict=True))
        assert answer == str(int(z > 0))
    assert 0.3 < sum(a == "1" for _, a in rows_of(certain)) / 256 < 0.7, "balanced"


def test_bayes_accuracy_of_a_noisy_sum():
    """The figure of the predecessor for 8 bits and seed 14; and what one gets who knows the weights."""
    known = draw("model_organisms", rule="weighted_sum_binary", k=8, seed=14, noise=1.0)
    assert known.facts["bayes_accuracy"] == pytest.approx(0.853, abs=5e-4)
    drawn = draw("model_organisms", rule="weighted_sum_binary", k=14, seed=3, noise=2.0, num_rows=16000)
    weights, intercept = drawn.facts["weights"], drawn.facts["intercept"]
    right = 0
    for row in drawn.splits["train"]:
        z = intercept + sum(w * int(x) for w, x in zip(weights, row["input"].split(), strict=True))
        right += row["output"] == str(int(z > 0))
    assert right / 12800 == pytest.approx(drawn.bayes_optimum["train"]["accuracy"], abs=0.015)  # 4 standard errors
    assert drawn.facts["bayes_accuracy"] == pytest.approx(drawn.bayes_optimum["train"]["accuracy"], abs=0.01)
    assert (
        draw("model_organisms", rule="weighted_sum_binary", weight_seed=14, seed=2).facts["weights"]
        == known.facts["weights"]
    )


def test_designs():
    heart = draw("model_organisms", rule="coin", design="memorization", p=0.7)
    assert (
        heart.splits["train"] == heart.splits["validation"] == heart.splits["test"]
        and len(heart.splits["train"]) == 200
    )
    assert heart.bayes_optimum["test"] == {"accuracy": 1.0} and heart.repeats
    fresh = draw("model_organisms", rule="coin", p=0.7, k=14, num_rows=10000)
    assert fresh.bayes_optimum["test"] == {"accuracy": 0.7}
    assert sum(o == "1" for _, o in rows_of(fresh)) / 10000 == pytest.approx(0.7, abs=0.02)
    ood = draw("model_organisms", design="ood", ood_lengths=[4, 12], ood_rows=16).splits
    lengths = {split: {len(r["input"].split()) for r in rows} for split, rows in ood.items()}
    assert lengths["train"] == lengths["test"] == {8}
    assert (lengths["validation_ood_0"], lengths["validation_ood_1"]) == ({4}, {12})


def test_bits_and_runs():
    for asked, answer in rows_of(draw("bit_sequences")):
        assert answer == str(asked.count("1") % 2)
    labels = [o for _, o in rows_of(draw("bit_sequences", label="bernoulli", p=0.3, length=14, num_rows=10000))]
    assert labels.count("1") / 10000 == pytest.approx(0.3, abs=0.02)
    for variant in ("pp", "pu", "up", "uu"):
        for asked, answer in rows_of(draw("predictable_or_not", variant=variant)):
            numbers = [int(n) for n in asked.split(", ")]
            run = numbers == list(range(numbers[0], numbers[0] + 5))
            assert len(numbers) == 5 and run == (variant[0] == "p") and 1 <= int(answer) <= 9999
            assert variant[1] == "u" or int(answer) == (numbers[-1] + 1 if variant == "pp" else 42)


def test_the_best_guess_about_twins_is_as_good_as_it_says():
    drawn = draw("synthetic_twins", num_rows=10000, r_identical=0.7)
    right, products = 0, {"0": [], "1": []}
    for row in drawn.splits["train"]:
        cells = row["input"].split(", ")
        pairs = [(float(a.split(": ")[1]), float(b)) for a, b in zip(cells[::2], cells[1::2], strict=True)]
        assert [c.split(":")[0] for c in cells[:6:2]] == ["V1", "V10", "V11"]
        # The log-likelihood ratio of two correlations, written out.
        odds = sum(
            sign * (-0.5 * math.log(1 - r * r) - (a * a - 2 * r * a * b + b * b) / (2 - 2 * r * r))
            for a, b in pairs for sign, r in ((1, 0.7), (-1, 0.4))
        )  # fmt: skip
        right += row["output"] == str(int(odds > 0))
        products[row["output"]] += [a * b for a, b in pairs]
    assert right / 8000 == pytest.approx(drawn.bayes_optimum["train"]["accuracy"], abs=0.015)
    assert 0.85 < drawn.bayes_optimum["train"]["accuracy"] < 0.93
    assert sum(products["1"]) / len(products["1"]) == pytest.approx(0.7, abs=0.02)
    assert sum(products["0"]) / len(products["0"]) == pytest.approx(0.4, abs=0.02)


def test_census():
    drawn = {w: draw("census", wording=w) for w in ("verbose", "condensed", "terse")}
    assert len({tuple(o for _, o in rows_of(d)) for d in drawn.values()}) == 1, "the same people and answers"
    first = {w: d.splits["train"][0]["input"] for w, d in drawn.items()}
    age = first["terse"].partition("AGE:")[2].partition("|")[0]
    assert f"- The age is: {age} years old.\n" in first["verbose"] and f"AGE: {age} | EDUCATION: " in first["condensed"]
    assert "income" in first["verbose"] and len(first["terse"]) < len(first["condensed"]) < len(first["verbose"])
    assert 0.7 < drawn["terse"].bayes_optimum["test"]["accuracy"] < 0.85
    assert draw("census", noise=0.0).bayes_optimum["test"] == {"accuracy": 1.0}
    dollars = draw("census", target="continuous", num_rows=5000)
    assert all(int(o) % 100 == 0 and int(o) > 0 for _, o in rows_of(dollars))
    assert dollars.bayes_optimum["train"]["rmse"] == pytest.approx(8000, rel=0.05)
    assert dollars.bayes_optimum["train"]["mae"] == pytest.approx(8000 * math.sqrt(2 / math.pi), rel=0.05)


def test_the_logistic_rule_of_the_census():
    """Whoever knows the rule reaches the Bayes optimum, and labels are drawn with its probabilities."""
    import cruijff_kit.data.generators.census as census

    rng = random.Random(5)
    people = [census._person(rng) for _ in range(20000)]
    chances = [sigmoid(log_odds(p)) for p in people]
    labels = [census._answer(rng, p, "binary", 1.0) for p in people]
    right = sum(label == str(int(c > 0.5)) for label, c in zip(labels, chances, strict=True)) / 20000
    assert right == pytest.approx(census._bayes_optimum(people, labels, "binary", 1.0)["accuracy"], abs=0.01)
    assert 0.4 < labels.count("1") / 20000 < 0.6
    likely = [label for label, c in zip(labels, chances, strict=True) if 0.8 < c < 0.9]
    assert likely.count("1") / len(likely) == pytest.approx(0.85, abs=0.03)


@pytest.mark.parametrize(
    ("generator", "arguments", "says"),
    [
        ("bit_sequences", {"length": 3}, r"num_rows must be from 3 to 8 \(sequences of 3 bits\), not 500"),
        ("bit_sequences", {"label": "sum"}, "label=sum does not exist; valid: parity, bernoulli"),
        ("predictable_or_not", {"variant": "xx"}, "valid: pp, pu, up, uu"),
        ("predictable_or_not", {"highest": 100}, "num_rows must be from 3 to 95 with highest=100, not 1000"),
        ("synthetic_twins", {"r_identical": 1.0}, "r_identical must be between -1 and 1"),
        ("synthetic_twins", {"traits": 0}, "traits must be from 1 to 200"),
        ("census", {"wording": "brief"}, "valid: verbose, condensed, terse"),
        ("census", {"noise": -1.0}, "noise must be from 0 to 5"),
        ("model_organisms", {"k": 4}, "num_rows=200 is too many: there are 16 sequences of 4 symbols"),
        ("model_organisms", {"rule": "partity"}, "rule=partity does not exist"),
        ("model_organisms", {"alphabet": "digits"}, "rule=parity takes alphabet=bits"),
        ("model_organisms", {"rule": "min"}, "take alphabet=digits or letters"),
        ("model_organisms", {"rule": "length"}, "set k_min below it"),
        ("model_organisms", {"rule": "nth", "n": 9}, "n=9 is no position in sequences of 8 symbols"),
        ("model_organisms", {"rule": "weighted_sum", "alphabet": "letters"}, "letters have no values"),
        ("model_organisms", {"rule": "weighted_sum", "noise": 1.0}, "weighted_sum_binary has"),
        ("model_organisms", {"rule": "weighted_sum", "intercept": "half"}, "neither balanced nor a whole number"),
        ("model_organisms", {"design": "ood"}, "lengths go with design=ood"),
        ("model_organisms", {"design": "ood", "ood_lengths": [8]}, "holds 8, which is trained on"),
        ("model_organisms", {"design": "ood", "ood_lengths": [3]}, "ood_rows=100 is too many: there are 8 sequences"),
        ("model_organisms", {"ood_lengths": [9, "x"]}, r"must be of type list\[int\]"),
        ("model_organisms", {"intercept": True}, r"must be of type str \| int"),
        ("capitalization", {"other_lengths": [5]}, "holds word_length=5"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_is_refused_with_the_numbers(generator, arguments, says):
    with pytest.raises(UserError, match=says):
        generate(generator, arguments)
    assert not arguments.get("k") or not generated_path(generator, arguments).exists()


def test_memorization_needs_leave_to_ask_what_it_trained_on(tiny, tmp_path):
    from cruijff_kit.runs.plan import plan_run

    where = ["model=hf_llama", f"model.path={tiny}", "device=cpu", f"output_dir={tmp_path / 'run'}"]
    config = cruijff_kit.compose(["dataset=model_organisms", "dataset.arguments.design=memorization", *where])
    with pytest.raises(UserError, match=r"dataset.allow_leaks=\[exact\]"):
        plan_run(config)
