"""Data tiers: where they come from, what a coding agent may do, and that nothing of red data gets out."""

import asyncio
import gzip
import io
import json
import logging
import os
import re
import stat
import subprocess
import sys
import traceback
import warnings
import zipfile
from pathlib import Path

import canaries
import pytest
import zipfile_zstd  # noqa: F401 (zipfile then reads what inspect-ai writes)
from inspect_ai.log import read_eval_log

import cruijff_kit
from cruijff_kit.commands.evaluate import main as evaluate
from cruijff_kit.commands.resume import main as resume
from cruijff_kit.config import data_policy
from cruijff_kit.config.identity import config_hash
from cruijff_kit.data import tiers
from cruijff_kit.records.result import RunResult, has_red_data, read_result, red_data_notice
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.records.saved_config import load_saved_config
from cruijff_kit.util import redaction
from cruijff_kit.util.agents import VARIABLES, detect_agent
from cruijff_kit.util.errors import UserError, one_line
from cruijff_kit.util.redaction import quote

FORMS = [canaries.CANARY.encode(), canaries.EXOTIC.encode(), json.dumps(canaries.EXOTIC)[1:-1].encode(),
         json.dumps(canaries.EXOTIC, ensure_ascii=False)[1:-1].encode()]  # fmt: skip
SOURCES = {"data", "kept"}  # where canaries come from, or may go


def in_a_place_of_its_own(folder: Path, tier: str | None, tiny: Path, *wanted: str) -> subprocess.CompletedProcess[str]:
    """canaries.py in a folder, with everything that a program may write to below it."""
    home = folder / "home"
    for name in ("", "tmp", "cache", "xdg"):
        (home / name).mkdir(parents=True)
    canaries.write_data(folder / "data")
    if tier is not None:
        (folder / "data" / "TIER").write_text(tier)
    (folder / "converted").symlink_to(folder / "data" / "converted")
    own = {"HOME": home, "TMPDIR": home / "tmp", "CRUIJFF_CACHE": home / "cache", "PYTHONDONTWRITEBYTECODE": "1"}
    own |= {f"XDG_{kind}_HOME": home / "xdg" / kind.lower() for kind in ("DATA", "CACHE", "CONFIG", "STATE")}
    kept = {k: v for k, v in os.environ.items() if k not in VARIABLES and not k.startswith(("WANDB_", "MLFLOW_"))}
    environment = kept | {k: str(v) for k, v in own.items()} | {"CRUIJFF_TRACEBACK": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, canaries.__file__, str(tiny), *wanted]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def red(tiny, tmp_path_factory):
    """Everything on red data: its folder, and what was printed."""
    folder = tmp_path_factory.mktemp("red")
    return folder, in_a_place_of_its_own(folder, "red", tiny)


@pytest.fixture(scope="module")
def green(tiny, tmp_path_factory):
    """Some of it on green data."""
    folder = tmp_path_factory.mktemp("green")
    return folder, in_a_place_of_its_own(folder, None, tiny, *IN_GREEN)


def unpacked(name: str, content: bytes) -> list[tuple[str, bytes]]:
    """A file, with what is packed inside it; names too."""
    found = [(name, name.encode() + b"\n" + content)]
    if content[:2] == b"PK":
        with zipfile.ZipFile(io.BytesIO(content)) as packed:
            found += [u for member in packed.namelist() for u in unpacked(f"{name}/{member}", packed.read(member))]
    elif content[:2] == b"\x1f\x8b":
        found += unpacked(f"{name}/unpacked", gzip.decompress(content))
    elif content[:4] == b"PAR1":
        import pyarrow.parquet

        found.append((name, str(pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()).encode()))
    return found


def with_canaries(folder: Path) -> list[str]:
    """Files below a folder in which a canary is, but for the data, the programs and adapters."""
    found = []
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.is_symlink() or not path.is_file() or place.parts[0] in SOURCES or path.suffix == ".safetensors":
            continue
        for name, content in unpacked(str(place), path.read_bytes()):
            if any(form in content for form in FORMS):
                found.append(name)
    return found


def codes(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Exit code of each command."""
    return dict(re.findall(r"^exit ([\w ]+): (\w+)", done.stdout, flags=re.MULTILINE))


ENDS = {
    "0": ["sweep", "chats", "risk", "resume", "posthoc", "table", "groups", "preview", "convert", "kept", "export"]
    + ["report", "compare", "embed", "reproduce", "status", "archive"],
    "1": ["single", "run", "posthoc again"],
    "2": ["broken", "noheader", "leaky", "split", "splits", "options", "built", "raises", "ours", "persons"],
    "130": ["stops"],
}
EXPECTED = {name: code for code, names in ENDS.items() for name in names}

IN_GREEN = ("sweep", "chats", "broken", "noheader", "run", "raises", "preview")


def test_red_data_stays_inside(red):
    """Nothing that was printed or written anywhere holds a word of a sample."""
    folder, done = red
    assert codes(done) == EXPECTED, done.stderr
    printed = (done.stdout + done.stderr).encode()
    assert not [line for line in printed.splitlines() if any(form in line for form in FORMS)]
    assert with_canaries(folder) == []


def test_the_same_search_finds_what_green_data_leaves(green):
    """Else the test above could not fail."""
    folder, done = green
    assert codes(done) == {name: EXPECTED[name] for name in IN_GREEN}, done.stderr
    found = " ".join(with_canaries(folder))
    printed = done.stdout + done.stderr
    for what in ("inputtrain", "outputtrain", "persontest", "systemtest", "broken", " first 0"):
        assert canaries.CANARY + what in printed, what
    logs = (
        "sweep/lr=0.01/eval/",
        "sweep/lr=0.01/eval/base_model",
        "runs/chats/eval",
        "home/cache/baseline",
        "/samples/",
    )
    others = (
        "summaries.json",
        "reductions.json",
        "traces",
        "runs/run/result.json",
        "runs/run/status.json",
        "results.csv",
    )
    for file in (*logs, *others, "sweep/lr=0.01/result.json", "train.log", ".tfevents.", "sweep/mlruns", ".wandb"):
        assert file in found, file


def test_answers_that_a_task_caches(red, green):
    """inspect-ai keeps them in the user's cache."""
    kept = [
        len([p for p in (f / "home" / "xdg" / "cache" / "inspect_ai").rglob("*") if p.is_file()])
        for f, _ in (red, green)
    ]
    assert kept[0] == 0 < kept[1]


def test_what_red_data_leaves_is_of_use(red):
    """Scores, comparisons, groups, risks; file, row and column of a fault, type and line of a foreign one."""
    folder, done = red
    results = json.loads(done.stdout.partition("exit table: 0\n")[2].partition("exit table")[0])["runs"]
    by_name = {Path(r["paths"]["run"]).name: r for r in results}
    sweep = by_name["lr=0.01"]
    assert (sweep["tier"], sweep["redacted"]) == ("red", True)
    assert {(c["task"], c["items"]) for c in sweep["comparisons"]} >= {("match", 8), ("echoes", 8)}
    assert done.stdout.count("red data: samples are withheld in logs and reports") == 6
    assert "ed data: samples are withheld" in (folder / "sweep" / "experiment_summary.md").read_text()
    assert "row 2: column 'output' must be text or a whole number, not list (withheld: red data)" in done.stdout
    assert "broken.jsonl, split 'train', row 2" in done.stdout
    assert "ValueError" in done.stdout and f"{folder}/tasks.py" in done.stdout and f"{folder}/metrics.py" in done.stderr
    report = json.loads((folder / "runs" / "risk" / "heterogeneity_report.json").read_text())
    (column,) = report["columns"]
    assert [g["name"] for g in column["groups"]] == ["f", "m"] and column["all"]["auc"] is not None
    assert "dataset.group_columns has sex" in done.stderr
    (log,) = (folder / "runs" / "risk" / "eval").glob("*.eval")
    scores = [s.scores["risk_scorer"].metadata for s in read_eval_log(str(log)).samples]
    assert [s["is_positive"] for s in scores] == [False, True] * 4 and all(0 <= s["risk"] <= 1 for s in scores)


def test_red_folders_are_the_owners_alone(red):
    folder, _ = red
    own = [folder / "sweep", folder / "runs" / "stops", folder / "data" / "converted"]
    files = [p for place in own for p in (place, *place.rglob("*"))]
    files += [p for p in (folder / "home" / "cache" / "baseline").rglob("*")]
    assert len(files) > 60 and {p for p in files if stat.S_IMODE(p.stat().st_mode) & 0o077} == set()
    assert (folder / "data" / "converted" / "TIER").read_text() == "red\n"


def test_the_strictest_tier_counts(tmp_path, tiny):
    """Folder above, folder itself, each file's own, by link and by the real path; a laxer setting does not help."""
    data, other = tmp_path / "above" / "data", tmp_path / "other"
    data.mkdir(parents=True)
    other.mkdir()
    (data / "a.csv").write_text("input,output\n1,2\n")
    (other / "b.csv").symlink_to(data / "a.csv")
    assert tiers.find_tier(str(data / "a.csv")) == "green"
    (tmp_path / "above" / "TIER").write_text(" Yellow\n")
    assert [tiers.find_tier(str(path)) for path in (data / "a.csv", other / "b.csv", data)] == ["yellow"] * 3
    (other / "TIER").write_text("RED")
    assert tiers.find_tier(str(other / "b.csv")) == "red" and tiers.find_tier(str(data / "a.csv")) == "yellow"
    assert tiers.find_tier({"train": str(data / "a.csv"), "test": str(other / "b.csv")}) == "red"
    (data / "TIER").write_text("green")
    assert tiers.find_tier(str(data)) == "yellow"
    model = ["model=hf_llama", f"model.path={tiny}", "dataset=files"]
    assert cruijff_kit.compose([*model, f"dataset.path={data / 'a.csv'}"]).dataset.tier == "yellow"
    assert not redaction.is_enabled()
    config = cruijff_kit.compose([*model, f"dataset.path={other / 'b.csv'}", "dataset.tier=green"])
    assert config.dataset.tier == "red" and redaction.is_enabled()
    (data / "TIER").write_text("green and red")
    with pytest.raises(UserError, match="TIER says none of green, yellow, red"):
        tiers.find_tier(str(data))
    with pytest.raises(UserError, match="tier=purple does not exist"):
        cruijff_kit.compose(["dataset.tier=purple"])


def test_what_a_process_with_red_data_says(capfd):
    """Values, foreign exceptions, log records and warnings are withheld everywhere; our own messages are not."""
    secret, heard = canaries.CANARY, io.StringIO()
    logger = logging.getLogger("theirs")
    logger.addHandler(handler := logging.StreamHandler(heard))
    ours, foreign = UserError("row 3 is empty"), None
    try:
        float(secret)
    except ValueError as error:
        foreign = error
    assert quote(secret) == repr(secret) and one_line(foreign).endswith(f"'{secret}'")
    redaction.enable()
    try:
        raise UserError("row 3 is empty") from foreign
    except UserError as error:
        raised = error
    try:
        logger.error("%s", secret, extra={"sample": secret}, exc_info=foreign)
        warnings.warn(secret, stacklevel=1)
        logging.getLogger("cruijff_kit.x").warning("no accuracy")
        sys.excepthook(ValueError, foreign, foreign.__traceback__)
        print("".join(traceback.format_exception(foreign)), file=sys.stderr)
        with redaction.silence():
            print(secret)
            subprocess.run(["echo", secret])
            print("our own words", file=redaction.get_stderr())
    finally:
        logger.removeHandler(handler)
    said = heard.getvalue() + "".join(capfd.readouterr()) + redaction.format_traceback(raised)
    assert secret not in said and "theirs said something (withheld: red data)" in said and "our own words" in said
    assert f'File "{__file__}", line' in said and "ValueError: (withheld: red data)" in said
    assert one_line(ours) == "row 3 is empty" != one_line(raised)  # a task of the user's may raise one of ours
    assert one_line(OSError(28, secret)) == "No space left on device (withheld: red data)"
    assert quote(secret) == one_line(foreign) == one_line(secret) == redaction.WITHHELD
    assert (
        redaction.quote_names(["age", "sex"]) == ["age", "sex"] and redaction.quote_names(["age", "Ann Lee, 34"]) == []
    )


def test_who_may_see_the_data_is_no_part_of_what_is_computed():
    typed = [
        "dataset.tier=red",
        'dataset.permission="Ann"',
        "dataset.group_columns=[sex]",
        "eval.keep_samples=true",
        "agent=true",
    ]
    assert config_hash(cruijff_kit.compose(typed)) == config_hash(cruijff_kit.compose())


@pytest.mark.parametrize("name", VARIABLES)
def test_agents_are_known(name):
    assert name in detect_agent(environment={name: "1"}) and detect_agent(environment={name: "0"}) is None
    assert detect_agent(False, {name: "1"}) is None and detect_agent(True, {}) == "agent=true"


def test_a_terminal_in_an_editor_is_no_agent():
    assert detect_agent(environment={"CURSOR_TRACE_ID": "x", "PAGER": "less"}) is None
    assert (
        detect_agent(environment={"CURSOR_TRACE_ID": "x", "PAGER": "head -n 10000 | cat"}) == "CURSOR_TRACE_ID is set"
    )


def refused(overrides: list[str]) -> str:
    """Why a run is not admitted; empty: it is."""
    try:
        data_policy.check_access(cruijff_kit.compose(overrides))
    except UserError as error:
        return str(error)
    return ""


def test_an_agent_asks_before_it_uses_yellow_data(monkeypatch):
    yellow = ["dataset.tier=yellow"]
    assert refused(yellow) == ""
    monkeypatch.setenv("CLAUDECODE", "1")
    why = refused(yellow)
    assert "CLAUDECODE is set" in why and why.endswith("""add 'dataset.permission="who allowed it, when"'""")
    assert refused([*yellow, 'dataset.permission=" "']) == why
    assert refused([*yellow, 'dataset.permission="Ann, 3 May"']) == refused([*yellow, "agent=false"]) == ""
    assert refused([]) == ""
    assert "keep_samples" in refused(["dataset.tier=red", "eval.keep_samples=true"])
    assert refused(["dataset.tier=red"]) == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WANDB_MODE", "online"),
        ("WANDB_MODE", "shared"),
        ("MLFLOW_TRACKING_URI", "https://mlflow.example.org"),
        ("MLFLOW_TRACKING_URI", "databricks"),
        ("MLFLOW_TRACKING_URI", "file://server/share"),
        ("INSPECT_LOG_DIR", "s3://bucket/logs"),
        ("INSPECT_TELEMETRY", "package.send"),
    ],
)
def test_red_data_goes_to_no_server(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert refused([]) == ""
    assert name in refused(["dataset.tier=red"])


def test_local_trackers_are_allowed(monkeypatch):
    for name, value in (
        ("WANDB_MODE", "offline"),
        ("MLFLOW_TRACKING_URI", "file:///tmp/x"),
        ("INSPECT_LOG_DIR", "logs"),
    ):
        monkeypatch.setenv(name, value)
    assert refused(["dataset.tier=red"]) == ""


def test_yellow_on_the_command_line(tmp_path, tiny, run_cli):
    """Refused with exit code 2 before anything is read; with permission it is recorded."""
    canaries.write_data(tmp_path / "data")
    (tmp_path / "data" / "TIER").write_text("yellow")
    typed = ["model=hf_llama", f"model.path={tiny}", "dataset=files", "dataset.path=data/broken.jsonl", "eval=none"]
    typed += ["device=cpu", "dtype=fp32", "dataset.validation_split=null", "num_warmup_steps=0", "hydra.run.dir=out"]
    no = run_cli(*typed, cwd=tmp_path, CODEX_SANDBOX="seatbelt")
    assert no.returncode == 2 and "dataset.permission=" in no.stderr and "row 2" not in no.stderr
    assert not (tmp_path / "out").exists()
    typed[3] = "dataset.path=data/rows.json"
    yes = run_cli(*typed, "dataset.permission=Ann", cwd=tmp_path, CODEX_SANDBOX="seatbelt")
    assert yes.returncode == 0, yes.stderr
    result = read_result(tmp_path / "out" / "result.json")
    assert (result.tier, result.permission, result.redacted) == ("yellow", "Ann", False)
    assert "permission: Ann" in (tmp_path / "out" / "config.yaml").read_text()


def test_samples_that_a_person_keeps(red):
    """eval.keep_samples=true: the logs are whole, and the owner's alone."""
    folder, _ = red
    result = read_result(folder / "kept" / "result.json")
    log = Path(result.evaluation[0].log)
    assert canaries.CANARY in read_eval_log(str(log)).samples[0].target and stat.S_IMODE(log.stat().st_mode) == 0o600
    assert not result.redacted and has_red_data(result) and "some logs hold them" in red_data_notice([result])


def test_what_an_adapter_has_learnt_is_the_owners_alone(red):
    folder, _ = red
    files = [p for p in (folder / "exported").rglob("*")]
    assert files and {p for p in (folder / "exported", *files) if stat.S_IMODE(p.stat().st_mode) & 0o077} == set()


def test_no_model_elsewhere_grades_red_answers():
    """A task may ask another model to grade; in the process is allowed, elsewhere not."""
    from inspect_ai.model import Model, get_model

    from cruijff_kit.evaluation.log_redaction import _allow_in_process, kept_in_memory

    class Elsewhere:
        def __str__(self) -> str:
            return "openai/gpt"

    async def answer(model):
        return f"asked {model}"

    assert asyncio.run(_allow_in_process(answer)(get_model("mockllm/model"))) == "asked mockllm/model"
    with pytest.raises(UserError, match="uses openai, an external model"):
        asyncio.run(_allow_in_process(answer)(Elsewhere()))
    before = Model.generate
    with kept_in_memory() as folder:
        assert Model.generate is not before and folder.startswith("memory://")
    assert Model.generate is before


def test_hooks_would_see_red_samples():
    from inspect_ai.hooks import Hooks, hooks

    from cruijff_kit.evaluation.log_redaction import kept_in_memory

    installed = True

    @hooks(name="spy", description="sees everything")
    class Spy(Hooks):
        def enabled(self) -> bool:
            return installed

    try:
        with pytest.raises(UserError, match="hook Spy would see each sample"), kept_in_memory():
            pass
    finally:
        installed = False  # for the tests that follow: a hook stays registered
    with kept_in_memory():
        pass


def test_data_that_was_marked_later(tmp_path, tiny, run_cli):
    """A green run's samples are withheld by reports once its data is red, and the red run is made anew."""
    canaries.write_data(tmp_path / "data")
    typed = ["-m", "model=hf_llama", f"model.path={tiny}", "dataset=files", "dataset.path=data/rows.json", "device=cpu"]
    typed += ["num_warmup_steps=0", "eval=none", "lr=1e-3"]
    assert run_cli(*typed, cwd=tmp_path).returncode == 0
    (first,) = (tmp_path / "multirun" / "rows").glob("*/*/result.json")
    result = read_result(first)
    result.paths["data"] = str(tmp_path / "data" / "rows.json")
    assert not has_red_data(result)
    (tmp_path / "data" / "TIER").write_text("red")
    assert has_red_data(result) and redaction.is_enabled()
    done = run_cli(*typed, cwd=tmp_path)
    assert done.returncode == 0 and "exist already" not in done.stderr
    assert sorted(read_result(p).redacted for p in (tmp_path / "multirun" / "rows").glob("*/*/result.json")) == [
        False,
        True,
    ]
    assert "exist already" in run_cli(*typed, cwd=tmp_path).stderr


def test_finished_and_unfinished_runs_on_data_that_became_yellow(tmp_path, tiny, monkeypatch):
    """resume and evaluate ask too; whom they ask for is theirs to say, not what a run's folder holds."""
    canaries.write_data(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    typed = ["model=hf_llama", f"model.path={tiny}", "dataset=files", "dataset.path=data/rows.json", "device=cpu"]
    typed += ["dtype=fp32", "num_warmup_steps=0", "eval=none", "agent=false", f"output_dir={tmp_path / 'run'}"]
    run = tmp_path / "run"
    cruijff_kit.train_then_eval(cruijff_kit.compose(typed))
    (tmp_path / "data" / "TIER").write_text("yellow")
    monkeypatch.setenv("COPILOT_CLI", "1")
    asked = [str(run), "eval=match", "eval.limit=2", "eval.baseline=false"]
    assert evaluate(asked) == 2 and read_result(run / "result.json").evaluation == []
    assert evaluate([*asked, "agent=false"]) == 0
    (run / "result.json").unlink()
    (run / "status.json").unlink()
    assert resume([str(run)]) == 2
    assert resume([str(run), "dataset.permission=Ann"]) == 0
    assert (
        read_result(run / "result.json").permission == "Ann" and "permission: Ann" in (run / "config.yaml").read_text()
    )


def test_a_job_was_admitted_when_it_was_submitted(tmp_path, tiny, monkeypatch):
    """Its node may have an agent's variables in its environment; what the submitter said is not kept for others."""
    canaries.write_data(tmp_path / "data")
    typed = ["model=hf_llama", f"model.path={tiny}", "dataset=files", f"dataset.path={tmp_path / 'data' / 'rows.json'}"]
    config = cruijff_kit.compose([*typed, "agent=true", f"output_dir={tmp_path / 'run'}"])
    RunFolder(config.output_dir).freeze(config, {})
    (tmp_path / "data" / "TIER").write_text("yellow")
    monkeypatch.setenv("COPILOT_CLI", "1")
    assert data_policy.check_access(load_saved_config(tmp_path / "run", agent=False)) == "yellow"
    with pytest.raises(UserError, match="COPILOT_CLI is set"):
        data_policy.check_access(load_saved_config(tmp_path / "run"))
    assert "agent: null" in (tmp_path / "run" / "config.yaml").read_text()


def test_group_columns_are_groups(tmp_path, tiny):
    from cruijff_kit.runs.plan import plan_run

    canaries.write_data(tmp_path / "data")
    place = f"dataset.path={tmp_path / 'data' / 'rows.json'}"
    typed = ["model=hf_llama", f"model.path={tiny}", "dataset=files", place, "device=cpu", "dataset.tier=red"]
    for column, why in (
        ("person", "identifies rows"),
        ("persn", "did you mean person"),
        ("input", "identifies rows"),
    ):
        with pytest.raises(UserError, match=why) as refusal:
            plan_run(cruijff_kit.compose([*typed, f"dataset.group_columns=[{column}]"]))
        assert canaries.CANARY not in str(refusal.value)


def test_results_without_a_tier_are_green(tmp_path):
    result = RunResult("r", "done", "e", "m", {}, {}, "hash")
    assert not has_red_data(result) and red_data_notice([result]) == ""
    assert not has_red_data(object())
