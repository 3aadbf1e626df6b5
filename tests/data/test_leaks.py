"""What stands in two splits is found, stops a run or is warned of; what only looks alike is not."""

import json
import random
import re
from pathlib import Path

import pytest
from inspect_ai.log import read_eval_log

import cruijff_kit
from cruijff_kit.data.conversations import Conversation
from cruijff_kit.data.generators.capitalization import draw_capitalization
from cruijff_kit.data.leaks import find_leaks, find_targets_in_prompts
from cruijff_kit.runs.plan import plan_evaluation, plan_run
from cruijff_kit.util.errors import UserError

DRAW = random.Random(5)
VOCABULARY = [w["input"] for rows in draw_capitalization(num_words=1300).splits.values() for w in rows]


def words(count: int) -> str:
    return " ".join(DRAW.choices(VOCABULARY, k=count))


def rows(texts, template="{}", answer="yes", **columns) -> list[Conversation]:
    """A row for each text; columns: name -> the value of each row."""
    return [
        Conversation(
            [{"role": "user", "content": template.format(t)}],
            answer,
            [t],
            n,
            columns={k: v[n] for k, v in columns.items()},
        )
        for n, t in enumerate(texts)
    ]


def found(**splits) -> dict[str, int]:
    return {f"{leak.kind} {leak.first} {leak.second}": leak.rows for leak in find_leaks(splits)}


def across(train, test, template="{}") -> dict[str, int]:
    """Kind -> rows of test."""
    splits = {"train": rows(train, template), "test": rows(test, template)}
    return {leak.kind: leak.rows for leak in find_leaks(splits, within=False)}


def test_the_same_prompt():
    a, b, c = (words(3) for _ in range(3))
    splits = {"train": rows([a, b, a, a]), "test": rows([b, c, b], answer="no")}
    assert found(**splits) == {"exact train test": 2, "exact train train": 2, "exact test test": 1}
    assert [leak.across for leak in find_leaks(splits, within=False)] == [True]
    first, second, _ = find_leaks(splits)
    assert (first.same_answer, first.of, first.example) == (0, 3, (1, 0)) and second.example == (0, 2)
    assert "2 of 3 rows of split 'test' exactly repeat prompts of 'train', 0 with the same answer" in str(first)


@pytest.mark.parametrize("count", [1, 3, 8, 11, 60])
@pytest.mark.parametrize("template", ["{}", "Say it: {}\nAnswer:"])
@pytest.mark.parametrize(
    "copy", [str.upper, str.title, "{}.".format, "{}?! ".format, " {}".format, lambda t: t.replace(" ", "  \t")]
)
def test_case_blanks_and_final_punctuation_make_no_other_prompt(count, template, copy):
    texts = list(dict.fromkeys(words(count) for _ in range(250)))
    assert across(texts, [copy(t) for t in texts[:200]], template) == {"exact": 200}


def test_what_differs_otherwise_is_another_prompt():
    assert across(["+", "5", "a b", "C", "0.5"], ["-", "-5", "ab", "C++", "05", "?"]) == {}
    assert across(["e\u0301t\u00e9"], ["\u00e9t\u00e9"]) == {"exact": 1}, "one letter, written in two ways"


def test_folded_copies_are_said_to_be_such():
    splits = {"train": rows(["a b c", "d e f"]), "test": rows(["A  b c.", "d e f", "g"])}
    (leak,) = find_leaks(splits)
    assert (leak.rows, leak.folded) == (2, 1)
    assert str(leak).startswith(
        "2 of 3 rows of split 'test' repeat prompts of 'train' (1 of them but for case, blanks or final "
        "punctuation), 2 with the same answer (for example test row 0, train row 0: 'A b c.')"
    )


def edited(text: str, count: int) -> str:
    """A text with some of its words replaced by others."""
    parts = text.split()
    for i in DRAW.sample(range(len(parts)), count):
        parts[i] = DRAW.choice(VOCABULARY)
    return " ".join(parts)


def shuffled(text: str) -> str:
    return " ".join(DRAW.sample(text.split(), len(text.split())))


def misspelt(text: str) -> str:
    """A text whose second word lacks a letter."""
    parts = text.split()
    parts[1] = parts[1][:2] + parts[1][3:]
    return " ".join(parts)


@pytest.mark.parametrize(
    ("count", "change", "least"),
    [
        (60, lambda t: edited(t, 3), 195),
        (60, shuffled, 200),
        (20, lambda t: edited(t, 2), 195),
        (9, lambda t: edited(t, 1), 190),
        (9, shuffled, 195),
        (9, misspelt, 190),
        (5, lambda t: f"so {t} then", 195),
        (4, shuffled, 190),
    ],
)
def test_near_copies_of_long_and_short_prompts(count, change, least):
    texts = [words(count) for _ in range(400)]
    got = across(texts, [change(t) for t in texts[:200]])
    assert got.get("near", 0) + got.get("exact", 0) >= least
    assert across(texts, [words(count) for _ in range(200)]) == {}


def test_near_copies_that_stand_many_times():
    """Copies in each split do not hide each other, nor make their own words common."""
    text, others = words(12), [words(12) for _ in range(300)]
    splits = {"train": rows([*others, *[text] * 50]), "test": rows([edited(text, 1)] * 40 + [words(12)] * 10)}
    assert found(**splits)["near train test"] == 40


LABELS = [f"{words(DRAW.randrange(3, 8))}, class {chr(97 + n)}" for n in range(24)]
TOWNS = [f"{a.title()} Falls, {b.title()} County" for a, b in zip(VOCABULARY[:60], VOCABULARY[60:120], strict=True)]


def profile() -> str:
    return (
        f"A person of {DRAW.randrange(18, 90)} years, {DRAW.choice(['female', 'male'])}, works as {DRAW.choice(LABELS)}, "
        f"lives in {DRAW.choice(TOWNS)} and earns {DRAW.randrange(10, 200)} thousand dollars a year."
    )


@pytest.mark.parametrize("count", [300, 5000])
def test_people_with_the_same_long_labels_are_not_the_same(count):
    """An occupation and a town of many seldom words each, in a questionnaire's words: half of a prompt is the same."""
    texts = list(dict.fromkeys(profile() for _ in range(count)))
    got = across(texts[: count * 4 // 5], texts[count * 4 // 5 :])
    assert got.get("near", 0) <= 0.002 * count, "so many may be people of one age and nearly one income"


@pytest.mark.parametrize(("changed", "near"), [(1, True), (12, False)])
def test_nearly_the_same_prompt(changed, near):
    texts = [words(40) for _ in range(200)]
    other = texts[7].split()
    for i in DRAW.sample(range(40), changed):
        other[i] = "zzz"
    splits = {"train": rows(texts), "test": rows([words(40), " ".join(other).upper() + "!"])}
    assert found(**splits) == ({"near train test": 1} if near else {})


def test_what_all_rows_share_is_no_repetition():
    """Long instructions, and the fixed words of a questionnaire, in the prompt's template or in the rows themselves."""
    instruction = words(150)
    made = [f"{instruction} The age is {DRAW.randrange(18, 90)} and the town is {words(1)}." for _ in range(400)]
    made = list(dict.fromkeys(made))
    assert found(train=rows(made[:300]), test=rows(made[300:])) == {}


def test_short_and_synthetic_prompts_pass():
    splits = draw_capitalization().splits
    template = words(60) + " {}"
    assert found(**{s: rows([r["input"] for r in of], template) for s, of in splits.items()}) == {}
    numbers = [", ".join(f"{DRAW.gauss(0, 1):.2f}" for _ in range(24)) for _ in range(300)]
    runs = [", ".join(map(str, range(n, n + 5))) for n in range(300)]
    for made in (numbers, runs, [" ".join(f"{n:09b}") for n in range(400)]):
        assert found(train=rows(made[:250]), test=rows(made[250:])) == {}


def test_scripts_without_spaces():
    text = "".join(chr(0x4E00 + DRAW.randrange(3000)) for _ in range(60))
    others = ["".join(chr(0x4E00 + DRAW.randrange(3000)) for _ in range(60)) for _ in range(50)]
    assert found(train=rows([*others, text]), test=rows([text[:30] + "一" + text[31:]])) == {"near train test": 1}


def test_targets_in_prompts():
    made = [("the answer is Paris, he said", "Paris"), ("comparison", "Paris"), ("1 2 3", "1"), ("parisian", "paris")]
    cases = [Conversation([], answer, [value], n) for n, (value, answer) in enumerate(made)]
    assert find_targets_in_prompts(cases) == [0]


@pytest.fixture
def compose(tiny, tmp_path):
    def made(splits, *overrides: str):
        path = tmp_path / "my.json"
        path.write_text(json.dumps({s: [{"input": t, "output": t[:1]} for t in texts] for s, texts in splits.items()}))
        model = [
            "model=hf_llama",
            f"model.path={tiny}",
            "device=cpu",
            "num_warmup_steps=0",
            "lora.rank=4",
            "eval.limit=2",
        ]
        where = ["dataset=files", f"dataset.path={path}", f"output_dir={tmp_path / 'run'}"]
        return cruijff_kit.compose([*model, *where, *overrides])

    return made


SPLITS = {
    "train": [words(2) for _ in range(30)],
    "validation": ["val one", "val two"],
    "test": ["test one", "test two"],
}


def test_a_run_with_a_leak_is_refused_unless_it_is_allowed(compose):
    leaky = SPLITS | {"test": [*SPLITS["test"], SPLITS["train"][4]]}
    with pytest.raises(UserError) as caught:
        plan_run(compose(leaky))
    assert str(caught.value) == (
        "1 of 3 rows of split 'test' exactly repeat prompts of 'train', 1 with the same answer (for example test "
        f"row 2, train row 4: {SPLITS['train'][4]!r}); take them out of one of the two, or allow it: "
        "dataset.allow_leaks=[exact]"
    )
    plan = plan_run(compose(leaky, "dataset.allow_leaks=[exact]"))
    assert plan.leaks == {"exact train test": 1} and plan.warnings == []
    assert plan_run(compose(leaky, "dataset.max_samples=4")).leaks == {}, "the row is not used"
    assert plan_run(compose(leaky, "eval=none")).leaks == {}, "the test split is not used"
    assert plan_run(compose(SPLITS)).leaks == {}


def test_memorising_on_purpose(compose):
    same = ["dataset.validation_split=train", "eval=none"]
    with pytest.raises(
        UserError, match=r"dataset.validation_split=train is the training split; choose another, or allow"
    ):
        plan_run(compose(SPLITS, *same))
    assert plan_run(compose(SPLITS, *same, "dataset.allow_leaks=[exact]")).leaks == {}
    with pytest.raises(UserError, match="dataset.allow_leaks=all does not exist; valid: exact, near, unit"):
        compose(SPLITS, "dataset.allow_leaks=[all]")


def test_near_leaks_are_warned_of(compose, capsys):
    text = words(16)
    near = SPLITS | {"train": [text, *SPLITS["train"][:5]], "test": [f"Now {text}", "test two"]}
    config = compose(near, "eval.max_tokens=2", "eval.baseline=false", "dataset.validation_split=null")
    (warning,) = plan_run(config).warnings
    assert warning.startswith("1 of 2 rows of split 'test' nearly repeat prompts of 'train', 0 with the same answer")
    cruijff_kit.train_then_eval(config)
    assert f"warning: {warning}\n" in capsys.readouterr().err
    assert plan_run(compose(near, "dataset.allow_leaks=[near]")).warnings == []


def test_a_prompt_that_leaves_no_room_for_the_answer_is_found_wherever_it_stands(compose):
    long = SPLITS | {"test": [*(f"test {n}" for n in range(60)), "long " * 120]}
    with pytest.raises(UserError, match="longest prompt of match has 6.. tokens, llama reads at most 512; shorten"):
        plan_run(compose(long, "eval.limit=null"))
    plan_run(compose(long, "eval.limit=20"))


def test_cut_rows_are_warned_of(compose, capsys):
    """Rows of 12 and of 60 letters, which are also the answers."""
    from cruijff_kit.sweep.dry_run import show

    texts = {"train": ["a" * 12, "b" * 60, "c" * 60], "validation": ["d" * 60]}
    config = compose(texts, "dataset.column_map.output=input", "dataset.max_seq_len=120", "eval=none")
    plan = plan_run(config)
    says = "of split '{}' are cut by dataset.max_seq_len=120, the longest by 21 tokens; "
    says += "truncated tokens do not contribute to the loss"
    assert plan.cut_rows == 2 and plan.leaks == {"target train": 3, "target validation": 1}
    assert plan.warnings == [f"2 of 3 rows {says.format('train')}", f"1 of 1 rows {says.format('validation')}"]
    show([(config, {})], Path())
    out = capsys.readouterr().out
    assert all(f"{config.run_name}: {line}\n" in out for line in plan.warnings)
    assert f"{config.run_name}: in 3 rows of split 'train' the prompt contains the answer\n" in out


def survey(count: int) -> list[str]:
    """What a survey of 96 profiles asks."""
    cells = [f"{a}, {b}, {c}, {d}" for a in "ABCD" for b in ("f", "m") for c in "xyz" for d in "1234"]
    return DRAW.choices(cells, k=count)


def test_a_survey_of_few_profiles_is_told_its_honest_choices(compose):
    splits = {"train": survey(500), "validation": survey(50), "test": survey(100)}
    with pytest.raises(UserError) as caught:
        plan_run(compose(splits, "eval.max_tokens=2"))
    says = str(caught.value)
    assert "each different prompt stands 5.2 times in 'train'" in says and "(a survey of few profiles)" in says
    assert "nothing is to be taken out" in says and "dataset.unit_column" in says
    assert "keep them and say so: dataset.allow_leaks=[exact]" in says
    assert plan_run(compose(splits, "dataset.allow_leaks=[exact]")).leaks["exact train test"] > 90


@pytest.fixture
def respondents(compose, tmp_path):
    """A function: overrides -> the config of a run on two items of each of 20 respondents, who stand in column `person`."""

    def made(*overrides: str, test=range(100, 105), person=lambda n: f"r{n}"):
        splits = {"train": range(20), "validation": range(50, 54), "test": test}
        both = {s: [{"input": f"{s} {n} {item}", "output": "ab"[n % 2], "person": person(n)} for n in of for item in "xy"]
                for s, of in splits.items()}  # fmt: skip
        config = compose({}, *overrides, "eval.max_tokens=2")
        (tmp_path / "my.json").write_text(json.dumps(both))
        return config

    return made


def test_a_unit_in_two_splits_is_a_leak(respondents, tmp_path):
    shared = dict(test=[3, 4, 100])
    assert plan_run(respondents(**shared)).leaks == {}, "who the rows are of is not known"
    named = "dataset.unit_column=person"
    with pytest.raises(UserError) as caught:
        plan_run(respondents(named, **shared))
    assert str(caught.value) == (
        "4 of 6 rows of split 'test' belong to units of 'train' (dataset.unit_column=person; for example "
        "test row 0, train row 6: 'r3'); split by person, so that all rows of a unit are in one split, or keep them and "
        "say so: dataset.allow_leaks=[unit] (result.json and the methods text then name it)"
    )
    assert plan_run(respondents(named)).leaks == {}, "rows of a unit may share a split"
    config = respondents(named, "dataset.allow_leaks=[unit]", "eval.baseline=false", "max_steps_per_epoch=1", **shared)
    assert plan_run(config).leaks == {"unit train test": 4}
    cruijff_kit.train_then_eval(config)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["leaks"] == {"unit train test": 4} and result["allowed_leaks"] == ["unit"]
    assert result["unit_column"] == "person"
    log = read_eval_log(result["evaluation"][0]["log"])
    assert log.eval.metadata["unit_column"] == "person"
    assert [s.metadata["person"] for s in log.samples] == ["r3", "r3"]


def test_units_are_the_same_however_their_numbers_are_written():
    splits = {"train": rows(["a", "b"], unit=[7.0, 8.5]), "test": rows(["c", "d", "e"], unit=[7, " 8.5", 9])}
    (leak,) = find_leaks(splits, unit_column="unit")
    assert (leak.kind, leak.rows, leak.example) == ("unit", 2, (0, 0))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("persn", "did you mean person?"),
        ("input", "row 0 of split 'train' has no unit"),
    ],
)
def test_a_unit_column_that_is_none(respondents, setting, message):
    with pytest.raises(UserError, match=re.escape(message)):
        plan_run(respondents(f"dataset.unit_column={setting}"))
    with pytest.raises(UserError, match=re.escape(message.replace("'train'", "'test'"))):
        plan_evaluation(respondents(f"dataset.unit_column={setting}"))
    with pytest.raises(UserError, match="row 2 of split 'train' has no unit; fill it in, or leave the row out"):
        plan_run(respondents("dataset.unit_column=person", person=lambda n: "" if n == 1 else n))


def test_of_red_data_a_unit_is_a_hash(respondents):
    """The same for rows of one unit, and in every run on the data; the name of the unit nowhere."""
    red = ["dataset.unit_column=person", "dataset.tier=red", "eval.limit=6", "max_steps_per_epoch=1"]
    result = cruijff_kit.train_then_eval(respondents(*red))
    for e in (*result.evaluation, *result.baseline):
        log = read_eval_log(e.log)
        units = [s.metadata["person"] for s in log.samples]
        assert units[0] == units[1] != units[2] == units[3] and all(u.startswith("#") and len(u) == 17 for u in units)
        assert log.eval.metadata["unit_column"] == "person" and "r100" not in log.model_dump_json()
