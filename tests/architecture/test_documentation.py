"""Every command that a page, a skill or AGENTS.md shows can be typed, and every link leads somewhere.

Each command is run in this process, on a copy of a small finished sweep with the names that the pages use for one's own
files. Training is planned (dry_run=true) instead of done, and on the tiny model.
"""

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest

import cruijff_kit
from cruijff_kit.commands.main import COMMANDS
from cruijff_kit.commands.main import main as cruijff_kit_command

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "AGENTS.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SKILLS = sorted((ROOT / ".claude" / "skills").glob("*/SKILL.md"))
TASKS = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match

@task
def sums(most: int = 3):
    return Task(dataset=[Sample(input=f"{n} + 1 =", target=str(n + 1)) for n in range(most)], scorer=match())
"""
METRICS = """
def exact(logits, labels, tokenizer, ignore_index):
    right = (logits.argmax(-1) == labels) | (labels == ignore_index)
    return {"exact": right.all(1).float().mean()}
"""
GROUPS = "TRUE_LABEL,PREDICTION,P(TRUE LABEL),GROUP\n1,1,0.9,a\n0,1,0.4,a\n1,1,0.8,b\n0,0,0.7,b\n"
# These need a cluster (tests/slurm), a network, or what is not installed here; that they are read is tested all the same.
ELSEWHERE = ("doctor", "logs", "cancel")


def commands(page: Path) -> list[str]:
    """The calls of our commands in a page's code, without comments, one line each."""
    text = re.sub(r" ?\\\n\s+", " ", page.read_text(encoding="utf-8"))
    lines = (line.strip() for line in text.splitlines() if line.startswith("    ") or "```" not in line)
    begin = r"^(?:\w+=\S+ )*(?:python -m cruijff_kit\.|cruijff-kit )"
    shown = (re.sub(r" \[[^\]]*\]", "", line) for line in lines if re.match(begin, line))  # what may be left out
    return [shlex.join(shlex.split(line, comments=True)) for line in shown]


# Command -> the pages that show it.
SHOWN: dict[str, list[str]] = {}
for _page in [*PAGES, *SKILLS]:
    for _command in dict.fromkeys(commands(_page)):
        SHOWN.setdefault(_command, []).append(_page.relative_to(ROOT).as_posix())


@pytest.fixture(scope="module")
def finished(tiny, trained_sweep, tmp_path_factory) -> Path:
    """A folder with a finished sweep of two epochs and the files that the pages call one's own."""
    from cruijff_kit.analysis.summary import write_summary
    from cruijff_kit.config.loading import register

    register()
    place = tmp_path_factory.mktemp("documented")
    with contextlib.chdir(place):
        sweep = place / "multirun" / "data_size" / "2026-01-01_00-00-00"
        shutil.copytree(trained_sweep, sweep)
        write_summary(sweep)
        shutil.copytree(place / "multirun" / "data_size", place / "multirun" / "capitalization_rank_lr")
        Path("my_tasks.py").write_text(TASKS)
        Path("my_metrics.py").write_text(METRICS)
        split = {9: "validation", 10: "test", 11: "test"}
        rows = [f"{n} + 1,{n % 2},q{n},Ann,{n % 2},{split.get(n, 'train')}" for n in range(12)]
        Path("my.csv").write_text("\n".join(["input,output,question,name,answer,split", *rows]) + "\n")
        Path("groups.csv").write_text(GROUPS)
        Path("my.json").write_text(json.dumps({s: [{"input": s, "output": "b"}] for s in ("train", "test")}))
        cruijff_kit_command(["data", "convert", "my.json", "saved_folder"])
        for group in ("dataset", "model", "experiment"):
            Path("my_conf", group).mkdir(parents=True)
        sums = {
            "train": [{"input": f"{n} + 1", "output": str(n)} for n in range(9)],
            "test": [{"input": "a", "output": "b"}],
        }
        Path("sums.json").write_text(json.dumps(sums))
        Path("my_conf/dataset/sums.yaml").write_text(
            'name: sums\npath: sums.json\nvalidation_split: null\nprompt: "{input} ="\n'
        )
        Path("my_conf/model/my_llama.yaml").write_text(f"defaults: [hf_llama, _self_]\nname: MyLlama\npath: {tiny}\n")
        shipped = (ROOT / "conf" / "experiment" / "capitalization_rank_lr.yaml").read_text()
        for name in ("NAME", "my_question"):
            Path("my_conf", "experiment", f"{name}.yaml").write_text(shipped)
    return place


@pytest.fixture
def place(finished, tmp_path, monkeypatch) -> Path:
    """A copy of it, to work in."""
    copy = tmp_path / "here"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(str(copy))
    for name in ("CLAUDECODE", "CLAUDE_CODE_ENTRYPOINT"):
        monkeypatch.delenv(name, raising=False)
    return copy


def filled_in(command: str, place: Path, tiny: Path) -> list[str]:
    """The command's words with real names in place of the capital ones."""
    sweep = next((place / "multirun" / "data_size").iterdir())
    run = sweep / "lr=0.01"
    names = {"ADAPTER_DIR": run / "epoch_1", "RUN_DIR": run, "OTHER_RUN_DIR": sweep / "lr=1e-06", "MODEL_DIR": tiny}
    names |= {"DIR": sweep, "RUN": "lr=0.01", "PATH": place / "groups.csv"}
    words = [w for w in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=\S*", w)]
    words = words[1:] if words[0] == "cruijff-kit" else [words[2].removeprefix("cruijff_kit."), *words[3:]]
    words = [" ".join(words[:2]), *words[2:]] if words[0] == "data" else words
    if words[0] == "heterogeneity":  # the words of this sweep belong to no group
        names["RUN_DIR"] = names["PATH"]
    to = {i for i, w in enumerate(words) if words[i - 1] == "--to"}
    return [
        str(place / "new_place") if i in to and w.isupper()
        else re.sub(rf"\b({'|'.join(names)})\b", lambda m: str(names[m[0]]), w)
        for i, w in enumerate(words)
    ]  # fmt: skip


def call(words: list[str]) -> tuple[int, str]:
    """The exit code and stderr of a command, run in this process."""
    said, seen = io.StringIO(), io.StringIO()
    words = [*words[0].split(), *words[1:]]
    argv, sys.argv = sys.argv, ["cruijff-kit", *words]
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(seen):
            code = cruijff_kit_command(words)
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        sys.argv = argv
    return code, said.getvalue()


@pytest.mark.parametrize("command", sorted(SHOWN))
def test_every_command_can_be_typed(command, place, tiny):
    words = filled_in(command, place, tiny)
    assert words[0] in COMMANDS, f"{', '.join(SHOWN[command])}: no such command"
    if words[0] == "train":
        code, said = train(words, tiny)
    elif words[0] in ELSEWHERE or any(w.startswith("slurm") for w in words):
        code, said = call(words)
        assert "--help lists its arguments" not in said and "Traceback" not in said
        return
    else:
        if words[0] == "evaluate" and "dry_run=true" not in words:
            words += ["dry_run=true"]
        if words[0] == "archive" and "--dry-run" not in words:
            words += ["--dry-run"]
        code, said = call(words)
    expected = 2 if "lora.rnk=8" in words else 0
    assert code == expected, said


def train(words: list[str], tiny: Path) -> tuple[int, str]:
    """A training command, planned on the tiny model; what only looks is called as it is."""
    settings = [w for w in words[1:] if "=" in w]
    if {"--help", "--cfg"} & {*words}:
        return call(words)
    if any("some_evals" in s or "optuna" in s for s in settings):  # a package that is not there; tested in tests/sweep
        cruijff_kit.compose([s for s in settings if not s.startswith("hydra") and "interval" not in s])
        return 0, ""
    more = [] if any(s.startswith("model=my_llama") for s in settings) else ["model=hf_llama", f"model.path={tiny}"]
    words = [w for w in words if not w.startswith(("model=", "model.path=", "scaffold=", "slurm", "dry_run"))]
    return call([*words, *more, "device=cpu", "num_warmup_steps=1", "dry_run=true"])


def test_there_are_commands_on_every_page():
    pages = {page for pages in SHOWN.values() for page in pages}
    assert sum(map(len, SHOWN.values())) > 80 and {s.relative_to(ROOT).as_posix() for s in SKILLS} <= pages
    text = " ".join(SHOWN).replace("python -m cruijff_kit.train", "cruijff-kit train")
    assert not [name for name in COMMANDS if f"cruijff-kit {name} " not in f"{text} "], "a command that no page shows"


@pytest.mark.parametrize("page", [*PAGES, *SKILLS], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
    assert not re.findall(r"python -m cruijff_kit\.(?!train\b)\w+", text), "commands are cruijff-kit NAME"
    for named in re.findall(r"`((?:docs|conf|cruijff_kit|tests|recipes)/[\w./]+)`", text):
        assert (ROOT / named.rstrip("/")).exists(), named


@pytest.mark.parametrize("skill", SKILLS, ids=lambda p: p.parent.name)
def test_skills_are_short_and_say_when(skill):
    text = skill.read_text(encoding="utf-8")
    head = re.match(r"---\nname: ([\w-]+)\ndescription: (.+)\n---\n", text)
    assert head and head[1] == skill.parent.name and "Use " in head[2]
    assert len(text.splitlines()) <= 60


def test_claude_md_points_to_agents_md():
    assert (ROOT / "CLAUDE.md").read_text().strip() == "@AGENTS.md"
    assert os.path.getsize(ROOT / "AGENTS.md") < 4000
