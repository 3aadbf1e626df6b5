"""`cruijff-kit data preview`: the tokens that training reads, its targets, and problems in the data."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

import cruijff_kit
from cruijff_kit.commands import data_preview_view
from cruijff_kit.commands.data_preview import main, preview
from cruijff_kit.commands.main import main as cruijff_kit_command
from cruijff_kit.training import process_cache

ROWS = ["split,id,input,output", "train,1,two é漢 words,yes", "train,2,more,no", "train,3,it says maybe so,maybe",
        "train,4,more,no", "validation,5,other,yes", "test,6,more,yes", "test,7,a 🎉,no"]  # fmt: skip


@pytest.fixture
def settings(tiny, tmp_path) -> list[str]:
    (tmp_path / "my.csv").write_text("\n".join(ROWS), encoding="utf-8")
    return ["model=hf_llama", f"model.path={tiny}", "dataset=files", f"dataset.path={tmp_path}/my.csv",
            "dataset.prompt='Say: {input}'"]  # fmt: skip


def test_tokens_are_those_of_training(settings, tmp_path):
    config = cruijff_kit.compose([*settings, f"output_dir={tmp_path / 'run'}"])
    examples = process_cache.get_dataset(config.torchtune["dataset"], config.torchtune["tokenizer"])
    for row in preview(config, rows=4)["rows"]:
        example = examples[row["row"]]
        ids = [i for t in row["tokens"] for i in t["ids"]]
        targets = [i for t in row["tokens"] if t["target"] for i in t["ids"]]
        assert ids == example.tokens and targets == example.tokens[example.first_label :]
        text = "".join(t["text"] for t in row["tokens"])
        assert f"Say: {ROWS[row['row'] + 1].split(',')[2]}<|im_end|>" in text, "characters of several bytes stay whole"


def test_what_is_odd_is_reported(settings, capsys):
    assert main([*settings, "--json", "--rows", "1", "--split", "test", "dataset.packed=true"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [(r["split"], r["row"], r["answer"], r["cut"]) for r in report["rows"]] == [("test", 0, "yes", 0)]
    assert {(k["kind"], k["first"], k["second"], k["rows"]) for k in report["leaks"]} == {
        ("exact", "train", "test", 1), ("exact", "train", "train", 1),
    }  # fmt: skip
    assert report["targets_in_prompts"] == {"train": [2], "validation": [], "test": []}
    assert report["unused_columns"] == ["id"]
    train = report["splits"]["train"]
    assert (train["rows"], train["answers"], train["packs"]) == (4, {"no": 2, "yes": 1, "maybe": 1}, 1)


def test_as_text(settings, capsys):
    assert main([*settings, "--rows=2"]) == 0
    out = capsys.readouterr().out
    assert "train row 0: " in out and "Say: two é漢 words<|im_end|>↵\n" in out and "⟦yes<|im_end|>⟧" in out
    assert out[out.index("│ no ") :].split()[:8] == ["│", "no", "│", "2", "(50%)", "│", "0", "(0%)"]
    assert "columns that the model does not see: id" in out
    assert "exact: 1 of 2 rows of split 'test' exactly repeat prompts of 'train', 0 with the same answer" in out
    assert "in 1 of 4 rows of split 'train' the prompt contains the answer (first: row 2)" in out


def test_in_colour(settings, monkeypatch):
    config = cruijff_kit.compose([*settings, "output_dir=x"])
    out = io.StringIO()
    monkeypatch.setattr(
        data_preview_view, "Console", lambda **_: Console(file=out, force_terminal=True, color_system="256", width=150)
    )
    data_preview_view.print_report(preview(config, rows=1))
    assert "\x1b[1;32m" in out.getvalue() and "⟦" not in out.getvalue()


def test_errors_are_one_line(settings, capsys):
    for arguments, says in [
        ([*settings, "dataset.path=none.csv"], "error: dataset.path: no such file none.csv"),
        ([*settings, "dataset.pth=x"], "error: unknown key dataset.pth; did you mean dataset.path?"),
        ([*settings, "dataset.max_seq_len=9"], "so dataset.max_seq_len=9 truncates the whole answer; raise it to"),
        ([*settings, "--split=dev"], "has no split 'dev'; valid: test, train, validation"),
    ]:
        assert main([*arguments]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("\n") == 1
    assert cruijff_kit_command(["data"]) == cruijff_kit_command(["data", "preveiw"]) == 2
    assert "cruijff-kit data preview or cruijff-kit data convert" in capsys.readouterr().err


def test_torch_is_not_needed(settings, environment, tmp_path):
    code = """
import sys
from cruijff_kit.commands.data_preview import main
main(sys.argv[1:])
assert 'torch' not in sys.modules
"""
    command = [sys.executable, "-c", code, *settings]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "⟦yes" in done.stdout, done.stderr
