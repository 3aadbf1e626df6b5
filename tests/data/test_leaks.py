"""What stands in two splits is found, stops a run or is warned of; what only looks alike is not."""

import json
import random
from pathlib import Path

import pytest

import cruijff_kit
from cruijff_kit.data.conversations import Conversation
from cruijff_kit.data.generators.capitalization import draw_capitalization
from cruijff_kit.data.leaks import find_leaks, targets_in_prompts
from cruijff_kit.errors import UserError
from cruijff_kit.plan import check

DRAW = random.Random(5)
VOCABULARY = [w["input"] for rows in draw_capitalization(num_words=1300).splits.values() for w in rows]


def words(count: int) -> str:
    return " ".join(DRAW.choices(VOCABULARY, k=count))


def rows(texts, template="{}", answer="yes") -> list[Conversation]:
    return [
        Conversation([{"role": "user", "content": template.format(t)}], answer, [t], n) for n, t in enumerate(texts)
    ]


def found(**splits) -> dict[str, int]:
    return {f"{leak.kind} {leak.first} {leak.second}": leak.rows for leak in find_leaks(splits)}


def test_the_same_prompt():
    a, b, c = (words(3) for _ in range(3))
    splits = {"train": rows([a, b, a, a]), "test": rows([b, c, b], answer="no")}
    assert found(**splits) == {"exact train test": 2, "exact train train": 2, "exact test test": 1}
    assert [leak.across for leak in find_leaks(splits, within=False)] == [True]
    first, second, _ = find_leaks(splits)
    assert (first.same_answer, first.of, first.example) == (0, 3, (1, 0)) and second.example == (0, 2)
    assert "2 of 3 rows of split 'test' ask exactly what rows of 'train' ask too, 0 with the same answer" in str(first)


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
    assert targets_in_prompts(cases) == [0]


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
        check(compose(leaky))
    assert str(caught.value) == (
        "1 of 3 rows of split 'test' ask exactly what rows of 'train' ask too, 1 with the same answer (for example test "
        f"row 2, train row 4: {SPLITS['train'][4]!r}); take them out of one of the two, or allow it: "
        "dataset.allow_leaks=[exact]"
    )
    plan = check(compose(leaky, "dataset.allow_leaks=[exact]"))
    assert plan.leaks == {"exact train test": 1} and plan.warnings == []
    assert check(compose(leaky, "dataset.max_samples=4")).leaks == {}, "the row is not used"
    assert check(compose(leaky, "eval=none")).leaks == {}, "the test split is not used"
    assert check(compose(SPLITS)).leaks == {}


def test_memorising_on_purpose(compose):
    same = ["dataset.validation_split=train", "eval=none"]
    with pytest.raises(
        UserError, match=r"dataset.validation_split=train is what is trained on; choose another, or allow"
    ):
        check(compose(SPLITS, *same))
    assert check(compose(SPLITS, *same, "dataset.allow_leaks=[exact]")).leaks == {}
    with pytest.raises(UserError, match="dataset.allow_leaks=all does not exist; valid: exact, near"):
        compose(SPLITS, "dataset.allow_leaks=[all]")


def test_near_leaks_are_warned_of(compose, capsys):
    text = words(16)
    near = SPLITS | {"train": [text, *SPLITS["train"][:5]], "test": [text.upper(), "test two"]}
    config = compose(near, "eval.max_tokens=2", "eval.baseline=false", "dataset.validation_split=null")
    (warning,) = check(config).warnings
    assert warning.startswith(
        "1 of 2 rows of split 'test' ask nearly what rows of 'train' ask too, 0 with the same answer"
    )
    cruijff_kit.train_then_eval(config)
    assert f"warning: {warning}\n" in capsys.readouterr().err
    assert check(compose(near, "dataset.allow_leaks=[near]")).warnings == []


def test_a_prompt_that_leaves_no_room_for_the_answer_is_found_wherever_it_stands(compose):
    long = SPLITS | {"test": [*(f"test {n}" for n in range(60)), "long " * 120]}
    with pytest.raises(UserError, match="longest prompt of match has 6.. tokens, llama reads at most 512; shorten"):
        check(compose(long, "eval.limit=null"))
    check(compose(long, "eval.limit=20"))


def test_cut_rows_are_warned_of(compose, capsys):
    """Rows of 12 and of 60 letters, which are also the answers."""
    from cruijff_kit.launch.dry_run import show

    texts = {"train": ["a" * 12, "b" * 60, "c" * 60], "validation": ["d" * 60]}
    config = compose(texts, "dataset.column_map.output=input", "dataset.max_seq_len=120", "eval=none")
    plan = check(config)
    says = "of split '{}' are cut by dataset.max_seq_len=120, the worst by 21 tokens; their ends are not learnt"
    assert plan.cut_rows == 2 and plan.leaks == {"target train": 3, "target validation": 1}
    assert plan.warnings == [f"2 of 3 rows {says.format('train')}", f"1 of 1 rows {says.format('validation')}"]
    show([(config, {})], Path())
    out = capsys.readouterr().out
    assert all(f"{config.run_name}: {line}\n" in out for line in plan.warnings)
    assert f"{config.run_name}: in 3 rows of split 'train' the answer stands in the prompt\n" in out
