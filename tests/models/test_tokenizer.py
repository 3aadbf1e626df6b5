"""Our rendering gives transformers' ids, and an example begins with its own prompt."""

import json
import random
import shutil

import pytest

from cruijff_kit.data.examples import IGNORE
from cruijff_kit.data.instruct import InstructDataset
from cruijff_kit.models.tokenizer import ChatTokenizer
from cruijff_kit.util.errors import UserError

LETTERS = "abc XYZ 019 .,!?'\"\n\t<|im_end|>{}é漢🎉ß \u200b"


def chats(seed: int, count: int) -> list[list[dict[str, str]]]:
    draw = random.Random(seed)

    def text() -> str:
        return "".join(draw.choices(LETTERS, k=draw.randint(0, 30)))

    made = []
    for _ in range(count):
        chat = [{"role": "system", "content": text()}] if draw.random() < 0.5 else []
        for _ in range(draw.randint(0, 2)):
            chat += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        made.append([*chat, {"role": "user", "content": text()}])
    return made


def assert_equal_to_transformers(folder, count: int) -> None:
    from transformers import AutoTokenizer

    theirs, ours = AutoTokenizer.from_pretrained(folder), ChatTokenizer(str(folder))
    for chat in chats(0, count):
        expected = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ours.encode_prompt(chat) == list(expected)
        text = theirs.apply_chat_template(chat, tokenize=False)
        assert ours.render(chat, add_generation_prompt=False) == text
        assert ours.decode(ours.encode_prompt(chat)) == theirs.decode(expected, skip_special_tokens=True)
    assert ours.eos_id == theirs.eos_token_id and ours.vocab_size == len(theirs)


def test_tiny(tiny):
    assert_equal_to_transformers(tiny, 200)


@pytest.mark.real_model
def test_smollm2(smollm2, tmp_path):
    """Its ids; and in a conversation the answers alone are targets, though some tokens are several newlines."""
    assert_equal_to_transformers(smollm2, 300)
    chat = [("system", "Be brief."), ("user", "2+2?"), ("assistant", "4"), ("user", "And 3+3?"), ("assistant", "6 ü")]
    row = json.dumps({"messages": [{"role": role, "content": text} for role, text in chat]})
    (tmp_path / "train.jsonl").write_text(row + "\n")
    tokenizer = ChatTokenizer(str(smollm2))
    (example,) = InstructDataset(tokenizer, data_files=str(tmp_path), split="train", column_map={})
    targets = [(t, label) for t, label in zip(example.tokens, example.labels, strict=True) if label != IGNORE]
    assert all(token == label for token, label in targets)
    assert tokenizer.decode([t for t, _ in targets], skip_special_tokens=False) == "4<|im_end|>6 ü<|im_end|>"


def test_an_example_is_its_prompt_and_the_answer_up_to_the_end_token(tiny):
    tokenizer = ChatTokenizer(str(tiny))
    for chat in chats(1, 50):
        for answer in ("x", " leading", "\nnewline", "two words.", "é"):
            tokens, length = tokenizer.encode_example(chat, answer)
            assert tokens[:length] == tokenizer.encode_prompt(chat)
            assert tokens[-1] in tokenizer.stop_tokens and tokens[-1] not in tokens[length:-1]
            assert tokenizer.decode(tokens[length:]) == answer


def test_base_model_reads_plain_text(tiny):
    tokenizer = ChatTokenizer(str(tiny), kind="base")
    tokens, length = tokenizer.encode_example([{"role": "user", "content": "2+2="}], "4")
    assert tokenizer.decode(tokens[:length]) == "2+2=" and tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(tokens[length:]) == "4"


@pytest.fixture
def copy(tiny, tmp_path):
    def changed(**settings):
        folder = shutil.copytree(tiny, tmp_path / "model", dirs_exist_ok=True)
        path = folder / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))
        return folder

    return changed


def test_what_is_missing_is_named(copy, tmp_path):
    with pytest.raises(UserError, match="no chat template; if this is a base model, set model.kind=base"):
        ChatTokenizer(str(copy(chat_template=None)))
    with pytest.raises(UserError, match="names no eos_token"):
        ChatTokenizer(str(copy(eos_token=None)))
    with pytest.raises(UserError, match="has no tokenizer.json"):
        ChatTokenizer(str(tmp_path / "nothing"))


def test_a_template_that_refuses(copy):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    with pytest.raises(UserError, match="refuses these messages \\(system user\\): no system role"):
        ChatTokenizer(str(copy(chat_template=template))).encode_prompt(
            [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
        )
