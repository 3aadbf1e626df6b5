"""Malformed data is refused in one line that names the file and the row; good data of any language comes through."""

import json

import pytest

from cruijff_kit.data.conversations import read_conversations
from cruijff_kit.data.rows import read_split
from cruijff_kit.util.errors import UserError

GOOD = {"train": [{"input": "a", "output": "b"}], "test": [{"input": "ü 漢字 🎉\n", "output": "é"}]}
COLUMNS = {"input": "input", "output": "output"}


def refused(path, split="train", prompt="{input}\n", columns=COLUMNS) -> str:
    with pytest.raises(UserError) as caught:
        read_conversations(str(path), split, columns, prompt, "")
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(tmp_path, content) -> str:
    path = tmp_path / "my.json"
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_good_data(tmp_path, encoding):
    path = write(tmp_path, json.dumps(GOOD, ensure_ascii=False).encode(encoding))
    (asked,) = read_conversations(str(path), "test", COLUMNS, "Say {input}", "Be kind.")
    assert asked.messages == [
        {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Say ü 漢字 🎉\n"},
    ]  # fmt: skip
    assert asked.answer == "é"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is not JSON: Expecting value at line 1, column 1"),
        (b'{"train": [\n{"input": "a",}]}', "at line 2, column 1"),
        ('{"train": [{"input": "caf\u00e9"}]}'.encode("latin-1"), "is not UTF-8 (line 1, byte 25)"),
        (b"\xff\xfe" + "{}".encode("utf-16-le"), "is not UTF-8"),
        ([{"input": "a", "output": "b"}, 7], "row 1: a int, not an object"),
        (
            b'{"input": "a", "output": "b"}\n{"input": "a"}',
            "if each line is a row of its own, add dataset.format=jsonl",
        ),
        (b'{"train": [{"input": "a", "input": "b"}]}', "the key 'input' occurs twice"),
        ("text", "holds a str"),
        ({"train": {"input": "a"}}, "split 'train' is a dict, not a list of rows"),
        ({"train": ["a"]}, "split 'train', row 0: a str, not an object"),
        ({"train": []}, "split 'train' is empty"),
        ({"validation": [], "test": []}, "has no split 'train'; valid: test, validation"),
        ({"trian": []}, "has no split 'train'; did you mean trian?"),
        ({"train": GOOD["train"] * 3 + [{"input": "a"}]}, "row 3: no column 'output'"),
        ({"train": [{"input": "a", "ouput": "b"}]}, "row 0: no column 'output'; did you mean ouput?"),
        ({"train": [{"input": 5.0, "output": "b"}]}, "column 'input' must be text or a whole number, not float 5.0"),
        ({"train": [{"input": True, "output": "b"}]}, "not bool True; write text, for example yes and no"),
        ({"train": [{"input": None, "output": "b"}]}, "row 0: column 'input' is empty; fill it in"),
        ({"train": [{"input": "a", "output": ["b"]}]}, "column 'output' must be text or a whole number, not list"),
        ({"train": [{"input": "a", "output": ""}]}, "row 0: column 'output' is empty"),
    ],
    ids=range(20),
)
def test_malformed_data(tmp_path, content, says):
    path = write(tmp_path, content)
    message = refused(path)
    assert says in message and str(path) in message


def test_missing_file_and_folder(tmp_path):
    assert "no such file" in refused(tmp_path / "none.json")
    assert "holds no data; expected one file per split, named SPLIT.json, " in refused(tmp_path)


def test_deeply_nested_json(tmp_path):
    assert "nested too deep" in refused(write(tmp_path, b"[" * 200_000))


def test_prompts(tmp_path):
    rows = {"train": [{"question": "q", "topic": "t", "output": "o"}]}
    path = write(tmp_path, rows)
    columns = {"input": "question", "output": "output"}
    (asked,) = read_conversations(str(path), "train", columns, '{topic}: {input} as {"json": 1} {question}', "")
    assert asked.messages[0]["content"] == 't: q as {"json": 1} q'
    assert "no column 'toppic'; did you mean topic?" in refused(path, prompt="{toppic}", columns=columns)
    assert "names no column" in refused(path, prompt="Hello", columns=columns)


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path, GOOD)
    assert len(read_split(str(path), "train")) == 1
    write(tmp_path, {"train": GOOD["train"] * 5})
    assert len(read_split(str(path), "train")) == 5
