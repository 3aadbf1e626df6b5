"""Whole conversations: how rows may be written, what is learnt of them, and that evaluation asks what training teaches."""

import json
import shutil

import pytest

import cruijff_kit
from cruijff_kit.data.conversations import read_conversations
from cruijff_kit.data.examples import IGNORE
from cruijff_kit.data.instruct import InstructDataset
from cruijff_kit.models.tokenizer import ChatTokenizer
from cruijff_kit.util.errors import UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "\n4"},
    {"role": "user", "content": "And 3+3?"},
    {"role": "assistant", "content": "6 ü"},
]
SHARE = {"system": "system", "user": "human", "assistant": "gpt"}
ROWS = {
    "messages": {"messages": CHAT},
    "ShareGPT": {"conversations": [{"from": SHARE[m["role"]], "value": m["content"]} for m in CHAT]},
    "prompt and completion": {"prompt": CHAT[:4], "completion": CHAT[4:]},
    "parts": {"messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in CHAT]},
    "a question left open": {"messages": [*CHAT, {"role": "user", "content": "And 4+4?"}]},
}


def write(folder, *rows, name="train") -> str:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return str(folder)


@pytest.mark.parametrize("written", ROWS)
def test_ways_to_write_a_conversation(tmp_path, written):
    (made,) = read_conversations(write(tmp_path, ROWS[written]), "train", {})
    assert made.messages == CHAT[:4] and made.answer == "6 ü" and made.has_messages
    assert made.values == ["2+2?", "\n4", "And 3+3?"]


def test_system_prompt_and_column(tmp_path):
    path = write(tmp_path, {"talk": CHAT, "output": "x"})
    (made,) = read_conversations(path, "train", {"messages": "talk"}, system_prompt="Answer.", type="messages")
    assert made.messages == [{"role": "system", "content": "Answer."}, *CHAT[1:4]]
    config = cruijff_kit.compose(
        ["dataset=files", "dataset.path=x", "dataset.column_map.messages=talk", "output_dir=x"]
    )
    assert config.dataset.column_map == {"input": "input", "output": "output", "messages": "talk"}
    (by_column,) = read_conversations(path, "train", {"messages": "talk"}, "{output}?")
    assert by_column.messages[0]["content"] == "x?", "an output column is taken first"


def test_prompt_and_completion_as_text(tmp_path):
    (made,) = read_conversations(write(tmp_path, {"prompt": "2+2=", "completion": "4"}), "train", {}, "{input}")
    assert made.messages == [{"role": "user", "content": "2+2="}] and made.answer == "4"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"messages": []}, "column 'messages' must be a list of messages"),
        ({"messages": "hello"}, "must be a list of messages"),
        (
            {"messages": [{"role": "user", "content": "x"}]},
            "row 0: no message of the assistant, so there is no answer to train on",
        ),
        ({"messages": CHAT[2:]}, "the conversation begins with the assistant"),
        (
            {"messages": [*CHAT[:4], {"role": "assistant", "content": " "}]},
            "message 4: the assistant's message is empty",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "message 0: the role 'tool' is not known; valid: system, user",
        ),
        ({"messages": [{"role": "user"}]}, "message 0: its content must be text, not None"),
        ({"messages": ["x"]}, 'message 0: must be {"role": ..., "content": ...}, not \'x\''),
        ({"mesages": CHAT}, "no column 'output'; valid: mesages"),
    ],
    ids=range(9),
)
def test_refusals(tmp_path, row, says):
    with pytest.raises(UserError) as caught:
        read_conversations(write(tmp_path, row), "train", {})
    assert says in str(caught.value) and str(tmp_path) in str(caught.value)


def test_a_prompt_has_no_place_in_conversations(tmp_path):
    with pytest.raises(UserError, match="hold whole conversations, which do not use dataset.prompt='Q: {input}'"):
        read_conversations(write(tmp_path, ROWS["messages"]), "train", {}, "Q: {input}")


def learnt(tokenizer, example) -> list[str]:
    """The stretches of an example that are learnt."""
    stretches, ids = [], []
    for token, label in zip([*example.tokens, 0], [*example.labels, IGNORE], strict=True):
        if label != IGNORE:
            assert label == token
            ids.append(token)
        elif ids:
            stretches.append(tokenizer.decode(ids, skip_special_tokens=False))
            ids = []
    return stretches


def dataset(tokenizer, path, **how):
    return InstructDataset(tokenizer, data_files=path, split="train", column_map={}, **how)


def check_turns(folder, path):
    tokenizer = ChatTokenizer(str(folder))
    (every,) = dataset(tokenizer, path)
    (last,) = dataset(tokenizer, path, train_on_last=True)
    (whole,) = dataset(tokenizer, path, train_on_input=True)
    end = tokenizer.id_to_token(tokenizer.eos_id)
    assert learnt(tokenizer, every) == [f"\n4{end}", f"6 ü{end}"]
    assert learnt(tokenizer, last) == [f"6 ü{end}"]
    assert every.tokens == last.tokens == whole.tokens and whole.labels == [IGNORE, *whole.tokens[1:]]
    assert last.tokens[: last.first_label] == tokenizer.encode_prompt(CHAT[:4])


def test_what_is_learnt(tmp_path, tiny):
    check_turns(tiny, write(tmp_path, ROWS["messages"]))


def test_a_cut_conversation(tmp_path, tiny):
    path = write(tmp_path, ROWS["messages"])
    (whole,) = dataset(ChatTokenizer(str(tiny)), path)
    last = len(whole.tokens) - 5
    cut = dataset(ChatTokenizer(str(tiny), max_seq_len=last - 20), path)[0]
    assert cut.cut == 25 and learnt(ChatTokenizer(str(tiny)), cut) == ["\n4<|im_end|>"]
    with pytest.raises(UserError, match=r"row 0: the prompt alone has \d+ tokens, so dataset.max_seq_len=40 truncates"):
        dataset(ChatTokenizer(str(tiny), max_seq_len=40), path)
    with pytest.raises(UserError, match=r"dataset.max_seq_len=\d+ truncates the whole answer"):
        dataset(ChatTokenizer(str(tiny), max_seq_len=last - 20), path, train_on_last=True)


def test_a_template_that_rewrites_earlier_turns(tmp_path, tiny):
    """As Qwen 3's, which drops what was thought in earlier turns."""
    (folder := tmp_path / "rewriting").mkdir()
    for file in tiny.glob("*token*"):
        shutil.copy(file, folder)
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>{% endif %}"
    )
    tokenizer = ChatTokenizer(str(folder))
    path = write(tmp_path, ROWS["messages"])
    with pytest.raises(UserError, match="renders an earlier turn differently.*set dataset.train_on_last=true"):
        dataset(tokenizer, path)
    assert learnt(tokenizer, dataset(tokenizer, path, train_on_last=True)[0]) == ["6 ü<|im_end|>"]


@pytest.fixture
def compose(tiny, tmp_path):
    def made(*overrides: str):
        model = [
            "model=hf_llama",
            f"model.path={tiny}",
            "device=cpu",
            "dtype=fp32",
            "num_warmup_steps=0",
            "lora.rank=4",
        ]
        return cruijff_kit.compose([*model, "dataset=files", f"output_dir={tmp_path / 'run'}", *overrides])

    return made


TALKS = [{"messages": [*CHAT[:3], {"role": "user", "content": f"And {n}+{n}?"}, {"role": "assistant", "content": str(n)}]}
         for n in range(60)]  # fmt: skip


def test_conversations_are_trained_on_and_asked_for(compose, tmp_path):
    """Of the test split the last turn is asked, in the tokens that training teaches; the drawn rows, by number."""
    for split, talks in {"train": TALKS[:20], "validation": TALKS[20:22], "test": TALKS[22:]}.items():
        path = write(tmp_path, *talks, name=split)
    config = compose(
        f"dataset.path={path}", "dataset.max_test_samples=12", "dataset.sample_seed=3", "eval.max_tokens=4"
    )
    result = cruijff_kit.train_then_eval(config)
    (evaluation,) = result.evaluation
    assert evaluation.samples == evaluation.prompts_checked == 12
    from inspect_ai.log import read_eval_log

    samples = read_eval_log(evaluation.log).samples
    rows = [s.metadata["row"] for s in samples]
    assert rows == sorted(rows) != list(range(12))
    assert [s.target for s in samples] == [TALKS[22 + n]["messages"][-1]["content"] for n in rows]
    assert [m.role for m in samples[0].input] == ["system", "user", "assistant", "user"]


def test_plain_text_is_trained_on_and_asked_for(compose, tmp_path):
    (tmp_path / "sums.csv").write_text(
        "split,input,output\n" + "".join(f"{s},{n}+{n},{n}\n" for n, s in enumerate(["train"] * 8 + ["test"] * 3))
    )
    more = ["model.kind=base", "dataset.type=text", "dataset.validation_split=null", "dataset.prompt='{input}='"]
    result = cruijff_kit.train_then_eval(compose(f"dataset.path={tmp_path}/sums.csv", *more, "eval.max_tokens=2"))
    assert result.evaluation[0].prompts_checked == 3


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["model.kind=base", "dataset.type=chat"],
            "is a base model, which has no chat template; set",
        ),
        (["model.kind=base", "dataset.type=messages"], "set dataset.type=text, or use a chat model"),
        (
            ["dataset.type=text"],
            "is a chat model, which needs its chat template; set dataset",
        ),
        (["dataset.type=chat_completion"], "dataset.type=chat_completion does not exist; valid: chat, text, messages"),
        (["dataset.format=xlsx"], "dataset.format=xlsx does not exist; valid: json, jsonl, csv, parquet, arrow"),
        (["dataset.max_test_samples=0"], "dataset.max_test_samples must be at least 1, not 0"),
    ],
)
def test_settings_that_contradict_each_other(compose, overrides, says):
    with pytest.raises(UserError) as caught:
        compose("dataset.path=x.json", *overrides)
    assert says in str(caught.value)


def test_a_base_model_has_no_template_for_conversations(compose, tmp_path):
    from cruijff_kit.runs.plan import plan_run

    write(tmp_path, *TALKS[:20])
    config = compose(
        f"dataset.path={tmp_path}/train.jsonl", "model.kind=base", "eval=none", "dataset.validation_split=null"
    )
    with pytest.raises(UserError, match="the rows hold conversations, which a base model has no template for"):
        plan_run(config)
