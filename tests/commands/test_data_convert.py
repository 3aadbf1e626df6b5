"""`cruijff-kit data convert`: every row is in what was written, of the same kind; nothing is overwritten."""

import json
from datetime import date

import pyarrow
import pyarrow.parquet
import pytest

from cruijff_kit.commands.data_convert import convert, main
from cruijff_kit.data.dataset_files import hash_data
from cruijff_kit.data.rows import read_splits
from cruijff_kit.util.errors import UserError

TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "é", "name": "x"}]
SPLITS = {
    "train": [{"input": "a\n", "output": "1", "n": 1}, {"input": "ü", "output": "2", "late": "only here", "n": 2}],
    "test": [{"messages": TALK}, {"messages": TALK[:1]}],
}


@pytest.fixture
def source(tmp_path):
    def written(splits=SPLITS) -> str:
        path = tmp_path / "my.json"
        path.write_text(json.dumps(splits))
        return str(path)

    return written


def without_none(value):
    if isinstance(value, dict):
        return {k: without_none(v) for k, v in value.items() if v is not None}
    return [without_none(v) for v in value] if isinstance(value, list) else value


@pytest.mark.parametrize("to", ["parquet", "jsonl", "json"])
def test_nothing_is_lost(source, tmp_path, to):
    made = convert(source(), tmp_path / "out", to)
    assert without_none(read_splits(str(tmp_path / "out"))) == SPLITS
    assert made["files"] == [str(tmp_path / "out" / f"{s}.{to}") for s in SPLITS] and made["rows"] == {
        "train": 2,
        "test": 2,
    }
    assert made["hash"] == hash_data(str(tmp_path / "out"))
    back = convert(str(tmp_path / "out"), tmp_path / "back", "jsonl")
    assert without_none(read_splits(str(tmp_path / "back"))) == SPLITS and back["rows"] == made["rows"]


def test_from_a_saved_data_set(tmp_path, capsys):
    from datasets import Dataset, DatasetDict

    rows = {s: [{"input": f"{s} {n}", "output": n} for n in range(5)] for s in ("train", "validation")}
    DatasetDict({s: Dataset.from_list(r) for s, r in rows.items()}).save_to_disk(tmp_path / "saved")
    capsys.readouterr()
    assert main([str(tmp_path / "saved"), str(tmp_path / "out"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == {"train": 5, "validation": 5}
    assert pyarrow.parquet.read_table(tmp_path / "out" / "train.parquet").to_pylist() == rows["train"]
    assert main([str(tmp_path / "saved"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out is there already; name a folder that does not exist\n"
    assert main([str(tmp_path / "saved"), str(tmp_path / "more"), "--to", "json"]) == 0
    assert "train.json  5 rows of split 'train'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ([1, "a"], "split 'train': column 'n' does not fit into one column of Parquet"),
        ([1, 2.5], "row 0: column 'n' would become 1.0, not 1; make its values of one kind, or add --to jsonl"),
        ([2**70, 1], "column 'n' does not fit into one column of Parquet"),
        ([True, 0], "column 'n'"),
    ],
)
def test_what_parquet_would_change_is_refused(source, tmp_path, values, says):
    path = source({"train": [{"n": v} for v in values]})
    with pytest.raises(UserError) as caught:
        convert(path, tmp_path / "out")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["my.json"], "nothing is left over"
    assert convert(path, tmp_path / "out", "jsonl")["rows"] == {"train": 2}


def test_refusals(source, tmp_path):
    def refused(path: str, says: str, to: str = "parquet") -> None:
        with pytest.raises(UserError, match=says):
            convert(path, tmp_path / "out", to)

    pyarrow.parquet.write_table(pyarrow.table({"day": [date(2020, 1, 1)]}), tmp_path / "days.parquet")
    refused(str(tmp_path / "days.parquet"), "a value cannot be written as JSON.*add --to parquet", "jsonl")
    refused(str(tmp_path / "none.csv"), "no such file")
    refused(source({"../up": [{"a": "b"}]}), "a split called '../up' cannot be the name of a file")
    refused(source({"train": []}), "split 'train' is empty")
    convert(str(tmp_path / "days.parquet"), tmp_path / "out")
