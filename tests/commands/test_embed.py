"""`cruijff-kit embed`: which model, which texts, which file; and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet
import pytest

from cruijff_kit import compose, train_then_eval
from cruijff_kit.commands.embed import main
from cruijff_kit.util.files import write_text

SMALL = ["dataset.max_samples=16", "num_warmup_steps=1", "lr=1e-2", "device=cpu", "dtype=fp32", "lora.rank=4"]


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory) -> Path:
    """A run of two epochs."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train_then_eval(
        compose(["model=hf_llama", f"model.path={tiny}", *SMALL, "epochs=2", "eval=none", f"output_dir={folder}"])
    )
    return folder


@pytest.fixture
def embed(capsys, tmp_path, monkeypatch):
    """Runs the command in this process and in an empty folder; returns exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def vectors(file: str, layer: int = 4) -> np.ndarray:
    return np.array(pyarrow.parquet.read_table(file)[f"embedding_{layer}"].to_pylist())


def test_rows_of_the_test_split_have_the_prompts_of_evaluation(run, embed, tiny):
    from transformers import AutoTokenizer

    code, out, _ = embed(run, "--to", "a.parquet", "--max-samples", 3, "--json")
    report = json.loads(out)
    assert code == 0 and report["shape"] == [3, 1, 128] and report["adapter"] == str(run / "epoch_1")
    table = pyarrow.parquet.read_table("a.parquet")
    rows = json.loads(Path(json.loads((run / "result.json").read_text())["paths"]["data"]).read_text())["test"]
    chat = [
        [{"role": "system", "content": "You are a helpful assistant."},
         {"role": "user", "content": f"Capitalize the word: {r['input']}"}] for r in rows[:3]
    ]  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    expected = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chat]
    texts = table["text"].to_pylist()
    assert table["id"].to_pylist() == [0, 1, 2]
    assert all(r["input"] in t for r, t in zip(rows, texts, strict=False)) and all(
        t.endswith("assistant\n") for t in texts
    )
    assert [t.rpartition("word: ")[2] for t in texts] == [t.rpartition("word: ")[2] for t in expected]


def test_which_model(run, embed, tiny):
    """The last epoch, an earlier one, the base model, the adapter's folder, the model's folder: each is itself."""
    options = ["--text", "Some text", "--text", "Other", "dtype=fp32", "device=cpu"]
    model = ["model=hf_llama", f"model.path={tiny}"]
    for name, items in {
        "last": [run], "first": [run, "--epoch", 0], "base": [run, "--base-model"], "adapter": [run / "epoch_0"],
        "model": [tiny], "settings": model, "bare": [run / "epoch_1", "--base-model"],
    }.items():  # fmt: skip
        assert embed(*items, *options, "--to", f"{name}.parquet")[0] == 0
    vectors_by_name = {
        n: vectors(f"{n}.parquet") for n in ("last", "first", "base", "adapter", "model", "settings", "bare")
    }
    for name in ("model", "settings", "bare"):
        np.testing.assert_allclose(vectors_by_name[name], vectors_by_name["base"], atol=1e-6)
    np.testing.assert_allclose(vectors_by_name["adapter"], vectors_by_name["first"], atol=1e-6)
    assert (
        min(np.abs(vectors_by_name[a] - vectors_by_name[b]).max() for a, b in (("last", "first"), ("first", "base")))
        > 1e-2
    )


def test_hdf5_has_the_documented_names(run, embed):
    import h5py

    options = ["--layers", "0,-1", "--pooling", "mean_non_padding", "--logits", "--top", 2, "--batch-size", 2]
    code, out, _ = embed(run, "--to", "e.h5", "--text", "Some text", "--text", "One", "--text", "a", *options)
    assert code == 0 and out.startswith("0: 'Some text' -> ") and "3 texts, layers 0, 4, " in out
    with h5py.File("e.h5") as file:
        assert file["tensor"].shape == (3, 2, 128) and file["logits"].shape == (3, 259)
        assert file["ids_dim0"][:].tolist() == [0, 1, 2] and file["attention_mask"].shape == (
            3,
            file["attention_mask"][:].sum(1).max(),
        )
        assert file.attrs["layers"].tolist() == [0, 4] and file.attrs["pooling"] == "mean_non_padding"
        assert file.attrs["adapter"] == str(run / "epoch_1") and Path(file.attrs["model"]).is_dir()
        logits = file["logits"][:].astype(float)
        shares = np.exp(logits - np.logaddexp.reduce(logits, 1, keepdims=True))
        np.testing.assert_allclose(file["next_probabilities"][:], np.sort(shares, 1)[:, ::-1][:, :2], atol=1e-6)


def test_texts_of_files(run, embed, tmp_path):
    write_text(tmp_path / "t.txt", "Some text\n\nOther\n")
    write_text(tmp_path / "t.csv", "id,said\n7,Some text\n8,Other\n")
    write_text(tmp_path / "t.jsonl", '{"text": "Some text", "x": 1}\n{"text": "Other", "x": 2}\n')
    for name, options in {"t.txt": [], "t.csv": ["--column", "said"], "t.jsonl": []}.items():
        assert embed(run, "--file", name, *options, "--to", f"{name}.parquet")[0] == 0
        assert pyarrow.parquet.read_table(f"{name}.parquet")["text"].to_pylist() == ["Some text", "Other"]
    np.testing.assert_array_equal(vectors("t.csv.parquet"), vectors("t.txt.parquet"))


def test_positions_without_pooling_are_as_many_as_tokens(run, embed):
    assert embed(run, "--text", "abc", "--text", "abcdefgh", "--pooling", "none", "--to", "n.parquet")[0] == 0
    table = pyarrow.parquet.read_table("n.parquet")
    lengths = [sum(mask) for mask in table["attention_mask"].to_pylist()]
    assert [len(rows) for rows in table["embedding_4"].to_pylist()] == lengths and lengths[1] - lengths[0] == 5
    assert len(table["embedding_4"].to_pylist()[0][0]) == 128


def test_red_data_leaves_no_text(embed, tiny, tmp_path):
    """Texts of a file with TIER beside it, whatever model reads them."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "t.txt").write_text("canary one\ncanary two\n")
    (tmp_path / "data" / "TIER").write_text("yellow")
    arguments = [tiny, "--file", "data/t.txt", "--to", "r.parquet"]
    code, _, err = embed(*arguments, "agent=true")
    assert code == 2 and "dataset.permission=" in err and not (tmp_path / "r.parquet").exists()
    assert embed(*arguments, "agent=true", "dataset.permission=Ann")[0] == 0
    (tmp_path / "data" / "TIER").write_text("red")
    code, out, err = embed(*arguments, "--force", "--top", 2)
    assert code == 2 and "--top" in err
    code, out, err = embed(*arguments, "--force")
    assert code == 0 and "text" not in pyarrow.parquet.read_table("r.parquet").column_names
    assert "canary" not in out + err and (tmp_path / "r.parquet").stat().st_mode & 0o077 == 0


def test_a_file_that_exists_is_kept(run, embed, tmp_path):
    write_text(tmp_path / "there.parquet", "mine")
    code, _, err = embed(run, "--text", "a", "--to", "there.parquet")
    assert code == 2 and "exists already" in err and (tmp_path / "there.parquet").read_text() == "mine"
    assert embed(run, "--text", "ab", "--to", "there.parquet", "--force")[0] == 0
    assert vectors("there.parquet").shape == (1, 128) and len(list(tmp_path.iterdir())) == 1


REFUSED = [
    (["{run}", "--layers", "5"], "0 (the embedding) to 4, or from the end -1 to -5"),
    (["{run}", "--layers", "-6"], "0 (the embedding) to 4, or from the end -1 to -5"),
    (["{run}", "--layers", "a"], "is not a list of whole numbers"),
    (["{run}", "--layers", "-1,4"], "names a layer twice"),
    (["{run}", "--epoch", "2"], "holds no adapter of epoch 2; there: 0, 1"),
    (["{run}", "lr=1"], "only device, dtype, threads, gpus can differ"),
    (["{run}", "--split", "tset"], "did you mean test?"),
    (["{run}", "--text", " "], "is empty"),
    (["{run}", "--text", "word " * 600], "reads at most 512"),
    (["{run}", "--text", "a", "--split", "test"], "two ways to name texts"),
    (["{run}", "--file", "none.txt"], "no such file"),
    (["{run}", "--pooling", "max"], "invalid choice"),
    (["{run}", "--batch-size", "0"], "must be at least 1"),
    (["nowhere"], "no such folder: nowhere"),
    (["lr=1"], "name a model"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_refused_in_one_line_and_nothing_written(run, embed, tmp_path, arguments, message):
    code, _, err = embed(*(a.format(run=run) for a in arguments), "--to", "x.parquet")
    assert code == 2 and message in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_the_ending_selects_the_format(run, embed):
    assert "unknown format; write .h5, .hdf5 or .parquet" in embed(run, "--text", "a", "--to", "x.npz")[2]
