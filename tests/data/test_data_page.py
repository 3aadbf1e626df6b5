"""What docs/data.md says about data of one's own can be typed, and what it describes can be read."""

import re
import shlex
from pathlib import Path

import pytest

import cruijff_kit
from cruijff_kit.data.conversations import read_conversations

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
SECTION = PAGE.partition("## Your own data\n")[2].partition("\n## ")[0]


def commands(section: str) -> list[list[str]]:
    joined = re.sub(r" \\\n\s+", " ", section)
    return [shlex.split(line, comments=True)[2:] for line in joined.splitlines() if line.startswith("    python -m ")]


@pytest.mark.parametrize("command", [c for c in commands(SECTION) if "convert" not in c], ids=str)
def test_every_command_composes(command):
    settings = [word for word in command if "=" in word]
    assert len(settings) >= 2 and cruijff_kit.compose([*settings, "output_dir=x"]).dataset.name == "my"


def test_every_setting_in_it_exists():
    named = re.findall(r"`((?:dataset|model)\.\w+(?:=\S+?)?|eval=none)`", SECTION)
    assert len(named) > 12
    for setting in named:
        if "=" not in setting:
            setting += "=" + {"dataset.path": "x", "dataset.max_seq_len": "9"}.get(setting, "null")
        given = setting.split("=")[0] == "dataset.path"
        alone = setting.startswith(("dataset.type", "dataset.column_map", "dataset.train_split"))
        base = ["model.kind=base"] if setting == "dataset.type=text" else []
        if not alone:
            cruijff_kit.compose(
                ["dataset=files", *([] if given else ["dataset.path=x"]), *base, setting, "output_dir=x"]
            )


def test_the_prompt_of_the_example(tmp_path):
    (tmp_path / "my.csv").write_text("split,question,name,answer\ntrain,2+2,Ann,4\n")
    (command,) = [c for c in commands(SECTION) if any("column_map" in word for word in c)]
    data = cruijff_kit.compose([*(w for w in command if "=" in w), "output_dir=x"]).dataset
    (made,) = read_conversations(str(tmp_path / data.path), "train", data.column_map, data.prompt, data.system_prompt)
    assert [m["content"] for m in made.messages] == [
        "Answer with a number.",
        "What is 2+2, Ann?",
    ] and made.answer == "4"


def test_files_by_name(tmp_path, tiny):
    """{train: ..., test: ...} in a run: read, hashed, trained, asked, and kept in the record."""
    (tmp_path / "a.csv").write_text("input,output\n" + "".join(f"{n} plus {n},{2 * n}\n" for n in range(9)))
    (tmp_path / "b.jsonl").write_text('{"input": "20 plus 1", "output": "21"}\n')
    where = ["dataset=files", f"dataset.path={{train: {tmp_path}/a.csv, test: {tmp_path}/b.jsonl}}"]
    model = ["model=hf_llama", f"model.path={tiny}", "device=cpu", "num_warmup_steps=0", "lora.rank=4", "dtype=fp32"]
    more = ["dataset.validation_split=null", "eval.max_tokens=2", f"output_dir={tmp_path / 'run'}"]
    config = cruijff_kit.compose([*where, *model, *more])
    assert config.dataset.name == "a"
    result = cruijff_kit.train_then_eval(config)
    assert result.evaluation[0].samples == 1 and result.paths["data"] == {
        "train": f"{tmp_path}/a.csv", "test": f"{tmp_path}/b.jsonl"
    }  # fmt: skip
    from cruijff_kit.records.saved_config import load_saved_config

    assert load_saved_config(tmp_path / "run").dataset == config.dataset
