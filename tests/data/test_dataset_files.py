"""Every layout gives the same rows; what is unclear or broken is refused in one line with file, split and row."""

import json
import random

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from cruijff_kit.data.conversations import read_conversations
from cruijff_kit.data.dataset_files import hash_data
from cruijff_kit.data.rows import read_split, select_rows
from cruijff_kit.util.errors import UserError

ROWS = {
    "train": [{"input": "a, b", "output": "1"}, {"input": "ü\n漢 \"x\"", "output": "2"}, {"input": "  c", "output": "3"}],
    "validation": [{"input": "d", "output": "4"}],
    "test": [{"input": "e", "output": "5"}],
}  # fmt: skip


def csv_text(rows, delimiter=",", **more) -> str:
    lines = [delimiter.join([*rows[0], *more])]
    for row in rows:
        lines.append(delimiter.join('"' + str(v).replace('"', '""') + '"' for v in [*row.values(), *more.values()]))
    return "\r\n".join(lines) + "\r\n"


def jsonl(rows) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def parquet(rows, path) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write(folder, layout: str):
    """The rows in a layout; returns dataset.path."""
    if layout == "one json":
        (folder / "words.json").write_text(json.dumps(ROWS))
        return folder / "words.json"
    if layout == "one jsonl with a split column":
        flat = [row | {"split": split} for split, rows in ROWS.items() for row in rows]
        (folder / "words.jsonl").write_text(jsonl(flat))
        return folder / "words.jsonl"
    if layout == "one csv with a split column":
        parts = [csv_text(rows, split=split) for split, rows in ROWS.items()]
        (folder / "words.csv").write_text(parts[0] + "".join(p.partition("\r\n")[2] for p in parts[1:]), newline="")
        return folder / "words.csv"
    if layout == "saved to disk":
        from datasets import Dataset, DatasetDict

        DatasetDict({s: Dataset.from_list(rows) for s, rows in ROWS.items()}).save_to_disk(folder / "d")
        return folder / "d"
    for split, rows in ROWS.items():
        file = folder / split
        if layout == "json":
            file.with_suffix(".json").write_text(json.dumps(rows))
        elif layout == "jsonl":
            file.with_suffix(".jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(rows).encode() + b"\n\n")
        elif layout == "csv":
            file.with_suffix(".csv").write_text(csv_text(rows), newline="")
        elif layout == "semicolons":
            file.with_suffix(".csv").write_bytes(b"\xef\xbb\xbf" + csv_text(rows, ";").encode())
        elif layout == "tsv":
            file.with_suffix(".tsv").write_text(csv_text(rows, "\t"), newline="")
        elif layout == "parquet":
            parquet(rows, file.with_suffix(".parquet"))
        elif layout == "shards in data/":
            (folder / "data").mkdir(exist_ok=True)
            for number, part in enumerate((rows[:1], rows[1:] or rows[:0])):
                parquet(part, folder / "data" / f"{split}-{number:05}-of-00002.parquet")
        elif layout == "named one by one":
            file.with_suffix(".jsonl").write_text(jsonl(rows))
    if layout == "named one by one":
        return {split: str(folder / f"{split}.jsonl") for split in ROWS}
    return folder


LAYOUTS = ["one json", "one jsonl with a split column", "one csv with a split column", "saved to disk", "json", "jsonl",
           "csv", "semicolons", "tsv", "parquet", "shards in data/", "named one by one"]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_rows(tmp_path, layout):
    path = write(tmp_path, layout)
    path = path if isinstance(path, dict) else str(path)
    (tmp_path / "dataset_info.json").write_text("{}")  # stands beside data on the hub
    for split, rows in ROWS.items():
        made = read_conversations(path, split, {}, "Q: {input}")
        assert [c.answer for c in made] == [r["output"] for r in rows]
        assert [c.messages for c in made] == [[{"role": "user", "content": f"Q: {r['input']}"}] for r in rows]
        assert [c.row for c in made] == list(range(len(rows)))
    with pytest.raises(UserError, match=r"has no split 'dev'; valid: test, train, validation"):
        read_split(path, "dev")
    assert hash_data(path) == hash_data(path)


@pytest.mark.parametrize("layout", ["csv", "shards in data/", "saved to disk", "named one by one"])
def test_the_hash_covers_every_file(tmp_path, layout):
    path = write(tmp_path, layout)
    before = hash_data(path)
    seen = {before}
    files = [f for f in tmp_path.rglob("*") if f.suffix in (".csv", ".parquet", ".arrow", ".jsonl")]
    assert len(files) >= 3
    for file in files:
        held = file.read_bytes()
        file.write_bytes(held + b" ")
        seen.add(hash_data(path))
        file.write_bytes(held)
    assert len(seen) == 1 + len(files)


@pytest.mark.parametrize(
    ("name", "split"), [("train.jsonl", "train"), ("test.csv", "test"), ("survey.parquet", "train")]
)
def test_one_file_may_be_one_split(tmp_path, name, split):
    path, rows = tmp_path / name, ROWS["train"]
    if path.suffix == ".parquet":
        parquet(rows, path)
    else:
        path.write_text(jsonl(rows) if path.suffix == ".jsonl" else csv_text(rows), newline="")
    assert read_split(str(path), split) == rows
    with pytest.raises(UserError) as caught:
        read_split(str(path), "validation")
    assert str(caught.value) == (
        f"{path} has no split 'validation': all its rows are {split!r}; set dataset.validation_split=null to train "
        "without validation, give the others too, or a column that names each row's split (dataset.split_column)"
    )


def test_a_split_column_of_another_name_or_none(tmp_path):
    path = tmp_path / "survey.csv"
    path.write_text("input,output,split,wave\na,b,left,1\nc,d,right,2\n")
    assert [r["input"] for r in read_split(str(path), "2", split_column="wave")] == ["c"]
    assert len(read_split(str(path), "train", split_column=None)) == 2
    with pytest.raises(UserError, match="has no split 'train'; valid: left, right"):
        read_split(str(path), "train")


def test_numbers_become_text_as_they_are_written(tmp_path):
    (tmp_path / "train.csv").write_text("input,output\n1,1.0\n007,TRUE\n1e3, NA\n")
    (written,) = {tuple(c.answer for c in read_conversations(str(tmp_path), "train", {}))}
    assert written == ("1.0", "TRUE", " NA")
    assert [c.values for c in read_conversations(str(tmp_path), "train", {})] == [["1"], ["007"], ["1e3"]]
    table = pyarrow.table({"age": pyarrow.array([51, 7], pyarrow.int8()), "p": [0.25, 1.0], "ok": [True, False],
                           "missing": pyarrow.array([1, None])})  # fmt: skip
    pyarrow.parquet.write_table(table, tmp_path / "typed.parquet")
    typed = str(tmp_path / "typed.parquet")
    made = read_conversations(typed, "train", {"output": "age"}, "{age} years")
    assert [(c.messages[0]["content"], c.answer) for c in made] == [("51 years", "51"), ("7 years", "7")]
    for column, says in [
        ("p", "row 0: column 'p' must be text or a whole number, not float 0.25; decimals can be written in many ways"),
        ("ok", "row 0: column 'ok' must be text or a whole number, not bool True; write text"),
        ("missing", "row 1: column 'missing' is empty; fill it in, or leave the row out"),
    ]:
        with pytest.raises(UserError) as caught:
            read_conversations(typed, "train", {"output": "age"}, "{" + column + "}")
        assert f"{typed}, split 'train', {says}" in str(caught.value)


BROKEN = [
    ("train.csv", b"input,output\na,b\nc\n", "row 1 (line 3): 1 cells, but 2 columns; put a cell with commas"),
    ("train.csv", b"input,output\na,b,\n", "row 0 (line 2): 3 cells, but 2 columns"),
    ("train.csv", b'input,output\n"a,b\n', "is not CSV: unexpected end of data"),
    ("train.csv", b"input,output,input\na,b,c\n", "2 columns are called 'input'; rename them in its first line"),
    ("train.csv", b"", "is empty; its first line must name the columns"),
    ("train.csv", b"input,output\n", "split 'train' is empty"),
    ("train.csv", b"input,output\na,\n", "split 'train', row 0: column 'output' is empty; fill it in"),
    ("train.csv", b"input,output\n,b\n", "split 'train', row 0: column 'input' is empty; fill it in"),
    ("train.csv", b"input,ouput\na,b\n", "row 0: no column 'output'; did you mean ouput?"),
    ("train.csv", "input,output\na,é\n".encode("cp1252"), "is not UTF-8 (line 2, byte 15); save it as UTF-8"),
    ("train.csv", "input,output\na,b\n".encode("utf-16"), "is not UTF-8 but UTF-16; save it as UTF-8"),
    ("train.jsonl", b'{"input": "a"\n', "row 0 (line 1) is not JSON: Expecting ',' delimiter at column 14"),
    ("train.jsonl", b'{"input": "a", "output": "b"}\n\n[1]\n', "row 1 (line 3): a list, not an object"),
    ("train.jsonl", b'{"a": 1, "a": 2}\n', "row 0 (line 1): the key 'a' occurs twice"),
    ("train.jsonl", b"\n", "split 'train' is empty"),
    ("train.json", b'{"train": [{"input": "a", "output": "b"}]}', "holds an object where a list of this split's rows"),
    ("train.parquet", b"PAR1 no", "is not Parquet: "),
    ("train.arrow", b"no", "is not Arrow: "),
    ("train.csv", b"input,output\ra,\r", "split 'train', row 0: column 'output' is empty"),
    (
        "train.jsonl",
        b'{"input": "\\ud83d", "output": "b"}',
        "row 0 (line 1): \\ud83d is half a char",
    ),
    ("train.json", b'[{"input": "\\ud83d\\ude00 \\uDE00", "output": "b"}]', "\\ude00 is half a character"),
]


@pytest.mark.parametrize(("name", "content", "says"), BROKEN, ids=range(len(BROKEN)))
def test_broken_files(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_conversations(str(tmp_path), "train", {})
    message = str(caught.value)
    assert says in message and "\n" not in message and str(tmp_path) in message


@pytest.mark.parametrize("format", ["parquet", "arrow"])
def test_damaged_files_are_refused(tmp_path, format):
    """Bytes changed one by one: rows, or a refusal in a line; never another error, nor the end of the process."""
    path, table = tmp_path / f"train.{format}", pyarrow.Table.from_pylist(ROWS["train"] * 5)
    if format == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as opened:
            opened.write_table(table)
    whole, refused = path.read_bytes(), 0
    draw = random.Random(1)
    for number in range(300):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(whole))] = draw.randrange(256)
        other = tmp_path / f"{number}.{format}"
        other.write_bytes(damaged)
        try:
            read_conversations(str(other), "train", {})
        except UserError as error:
            refused += 1
            assert str(other) in str(error) and "\n" not in str(error)
    assert refused > 30


def test_columns_of_one_name_in_parquet(tmp_path):
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["input", "input"])
    pyarrow.parquet.write_table(twice, tmp_path / "train.parquet")
    with pytest.raises(UserError, match="2 columns are called 'input'; rename them"):
        read_split(str(tmp_path), "train")


def test_unclear_folders(tmp_path):
    def refused(path, **how) -> str:
        with pytest.raises(UserError) as caught:
            read_split(path, "train", **how)
        return str(caught.value)

    parquet(ROWS["train"], tmp_path / "train.parquet")
    (tmp_path / "train.jsonl").write_text(jsonl(ROWS["train"]))
    assert "holds both train.jsonl and train.parquet" in refused(str(tmp_path))
    assert read_split(str(tmp_path), "train", format="parquet") == ROWS["train"]
    (tmp_path / "rows.dat").write_text(jsonl(ROWS["train"]))
    assert "cannot be told from its name; add dataset.format=json, jsonl" in refused(str(tmp_path / "rows.dat"))
    assert read_split(str(tmp_path / "rows.dat"), "train", format="jsonl") == ROWS["train"]
    (shards := tmp_path / "shards").mkdir()
    parquet(ROWS["train"], shards / "train-00000-of-00002.parquet")
    assert "holds 1 of the 2 files of split 'train'" in refused(str(shards))
    assert "no such file" in refused({"train": str(tmp_path / "none.csv")})
    assert "is a folder where a file is expected" in refused({"train": str(shards)})
    assert "names no file" in refused({})


def test_one_saved_data_set(tmp_path):
    from datasets import Dataset

    Dataset.from_list(ROWS["train"]).save_to_disk(tmp_path / "one")
    assert read_split(str(tmp_path / "one"), "train") == ROWS["train"]


def test_which_rows_are_used():
    assert select_rows(5, None, None, "train") == select_rows(5, 9, 1, "train") == [0, 1, 2, 3, 4]
    assert select_rows(100, 3, None, "train") == [0, 1, 2]
    small, large = select_rows(100, 10, 1, "train"), select_rows(100, 30, 1, "train")
    assert len(small) == 10 and set(small) < set(large) and small == sorted(small) != list(range(10))
    assert small != select_rows(100, 10, 2, "train") and small != select_rows(100, 10, 1, "test")
