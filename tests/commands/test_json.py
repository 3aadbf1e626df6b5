"""`--json`: stdout is one document of the shape that docs/json.md has, whatever happens; and nobody is waited for."""

import contextlib
import io
import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from forked import forked

from cruijff_kit.commands.base import run_command
from cruijff_kit.commands.main import COMMANDS, main
from cruijff_kit.records.sweep_manifest import Submission, edit_sweep_manifest
from cruijff_kit.util import json_output

SMALL = ["dataset.max_samples=16", "num_warmup_steps=1", "device=cpu", "dtype=fp32", "eval.limit=4"]
CSV = "TRUE_LABEL,PREDICTION,P(TRUE LABEL),GROUP\n1,1,0.9,a\n0,1,0.4,a\n1,1,0.8,b\n0,0,0.7,b\n"


@pytest.fixture(scope="module")
def cwd(tmp_path_factory):
    """Where this file's commands are given."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("json")
    os.chdir(folder)
    yield folder
    os.chdir(before)


@pytest.fixture(scope="module")
def call(tiny, cwd):
    """Gives `cruijff-kit COMMAND ARGUMENTS --json` in this process; returns the exit code, the document, and stderr."""

    def made(command: str, *arguments: str) -> tuple[int, object, str]:
        model = ["model=hf_llama", f"model.path={tiny}", *SMALL] if command == "train" else []
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main([*command.split(), *arguments, *model, "--json"])
        return code, json.loads(out.getvalue(), parse_constant=pytest.fail), err.getvalue()

    made.cwd = cwd
    return made


@pytest.fixture(scope="module")
def sweep(tiny, cwd, environment):
    """One run that works and one whose loss overflows, from a shell without a terminal."""
    line = ["--json", "-m", "lr=1e-3,1e30", "lr_scheduler=constant", "epochs=2", "hydra.sweep.dir=out"]
    done = forked("train", [*line, "model=hf_llama", f"model.path={tiny}", *SMALL], cwd, environment)
    return done.returncode, json.loads(done.stdout), done.stderr, cwd / "out"


def checked_error(answered: tuple[int, object, str], code: int, kind: str) -> dict:
    """The error of a document, of which nothing but the message has reached stderr."""
    returned, document, stderr = answered
    error = document["error"]
    assert set(error) == {"type", "message", "fix", "exit_code"}
    assert (returned, error["exit_code"], error["type"]) == (code, code, kind)
    assert error["fix"] and "Traceback" not in stderr
    return error


def test_a_sweep_with_a_failed_run(sweep, documented):
    """Exit code 1, and the document has both runs all the same."""
    code, document, stderr, folder = sweep
    error = checked_error((code, document, stderr), 1, "run")
    assert error["message"] == "1 of 2 runs failed" and "cruijff-kit resume" in error["fix"]
    documented("train", {k: v for k, v in document.items() if k != "error"})
    documented("table", {k: document[k] for k in ("runs", "best", "configurations", "detectable_difference")})
    assert {r["name"]: r["status"] for r in document["runs"]} == {"lr=0.001": "done", "lr=1e+30": "failed"}
    assert document["folder"] == str(folder) and document["existing"] == document["submitted"] == []
    assert "[2/2] lr=1e+30" in stderr and "│" not in stderr, "progress, but no tables"


def test_what_is_not_made_again(sweep, call):
    line = ["-m", "lr=1e-3,1e30", "lr_scheduler=constant", "epochs=2", "hydra.sweep.dir=out"]
    code, document, stderr = call("train", *line)
    assert document["existing"] == [{"name": "lr=0.001", "folder": str(sweep[3] / "lr=0.001"), "state": "done"}]
    assert code == 1 and len(document["runs"]) == 2 and "[1/1] lr=1e+30" in stderr


def test_a_single_run_and_a_failed_one(call, documented):
    code, document, _ = call("train", "eval=none", "hydra.run.dir=one")
    assert code == 0 and [r["status"] for r in document["runs"]] == ["done"]
    documented("train", document)
    failed = call("train", "eval=none", "hydra.run.dir=two", "lr=1e30", "lr_scheduler=constant", "epochs=3")
    error = checked_error(failed, 1, "run")
    assert error["fix"].startswith("try a smaller lr") and [r["status"] for r in failed[1]["runs"]] == ["failed"]


def test_dry_runs(call, documented):
    for line in (["-m", "lora.rank=2,4", "dry_run=true"], ["dry_run=true", "hydra.run.dir=dry"]):
        code, document, _ = call("train", *line)
        documented("train, dry run", document)
        assert code == 0 and document["arrays"] == [] and document["dry_run"] is True
        assert [r["swept"] for r in document["runs"]] == (
            [{"lora.rank": 2}, {"lora.rank": 4}] if "-m" in line else [{}]
        )
        assert document["runs"][-1]["torchtune"]["model"]["lora_rank"] == (4 if "-m" in line else 64)
    assert not (call.cwd / "dry").exists()


def test_a_scaffold(call, documented):
    code, document, _ = call("train", "-m", "lora.rank=2,4", "scaffold=true", "hydra.sweep.dir=planned")
    documented("train, scaffold", document)
    assert code == 0 and [r["name"] for r in document["planned"]] == ["rank=2", "rank=4"] and document["runs"] == []
    states = call("status", "planned")[1]
    assert {view["state"] for view in states} == {"planned"}


def test_hydras_own_words(call, documented):
    code, config, _ = call("train", "lora.rank=4", "--cfg", "job", "--resolve")
    assert code == 0 and config["lora"]["alpha"] == 8 and config["torchtune"]["model"]["lora_rank"] == 4
    assert call("train", "lr=3e-5", "--cfg=job", "--package=lr")[1] == 3e-5
    code, document, _ = call("train", "--help")
    documented("help", document)
    assert code == 0 and "EXAMPLES" in document["help"]


def test_commands_that_look(sweep, call, documented):
    out = str(sweep[3])
    for module, section in (("table", "table"), ("status", "status")):
        code, document, stderr = call(module, out)
        documented(section, document)
        assert (code, stderr) == (0, "")
        assert len(document["runs"] if section == "table" else document) == 2
    code, watched, _ = call("status", out, "--watch")
    assert code == 1 and [v["state"] for v in watched] == ["done", "failed"]
    assert call("cancel", out)[:2] == (0, {"cancelled": []})
    code, document, _ = call("export", f"{out}/lr=0.001", "--to", "adapter")
    documented("export", document)
    assert code == 0 and document["bytes"] == sum(p.stat().st_size for p in (call.cwd / "adapter").iterdir())


def test_logs(sweep, call, documented):
    """Of a run that was submitted, as its manifest says."""
    folder = sweep[3]
    log = folder / ".submitit" / "7_0_log.out"
    log.parent.mkdir(exist_ok=True)
    log.write_text("one\ntwo é\n")
    with edit_sweep_manifest(folder) as manifest:
        manifest.runs[0].submissions = [Submission("2026-01-01T00:00:00+00:00", "x.sh", job_id="7")]
    for more in ([], ["--follow"]):
        code, document, _ = call("logs", str(folder), manifest.runs[0].name, *more)
        documented("logs", document)
        assert code == 0 and document["lines"] == ["one", "two é"] and document["log"] == str(log)
    with edit_sweep_manifest(folder) as manifest:
        manifest.runs[0].submissions = []


def test_evaluate(sweep, call, documented):
    line = [str(sweep[3]), "eval=match", "eval.limit=4", "eval.epochs=all"]
    code, document, _ = call("evaluate", *line, "dry_run=true")
    documented("evaluate, dry run", document)
    assert code == 0 and [c["run"] for c in document["cells"]] == ["lr=0.001"]
    planned = document["cells"][0]
    code, document, _ = call("evaluate", *line)
    documented("evaluate", document)
    made = [(c["task"], c["epoch"]) for c in document["made"]]
    assert made == [(t, None) for t in planned["base_model"]] + [(c["task"], c["epoch"]) for c in planned["trained"]]
    assert code == 0 and len(made) == 3 and len(document["runs"]) == 2
    assert call("evaluate", *line)[1]["made"] == []


def test_resume(sweep, call, documented):
    code, document, _ = call("resume", str(sweep[3]))
    error = checked_error((code, document, ""), 1, "run")
    documented("resume", {k: v for k, v in document.items() if k != "error"})
    assert document["to_finish"] == ["lr=1e+30"] and error["message"] == "1 of 2 runs failed"
    assert {s["name"]: s["state"] for s in document["states"]} == {"lr=0.001": "done", "lr=1e+30": "failed"}


def test_data_and_groups(tiny, call, documented):
    rows = "".join(f"ask {i},{i % 2},{split}\n" for i in range(6) for split in ("train", "validation", "test"))
    (call.cwd / "my.csv").write_text("input,output,split\n" + rows.replace("ask", "ask {}"))
    (call.cwd / "groups.csv").write_text(CSV)
    data = ["dataset=files", "dataset.path=my.csv", "model=hf_llama", f"model.path={tiny}"]
    for module, section, *line in (
        ("data preview", "data preview", *data),
        ("data convert", "data convert", "my.csv", "converted"),
        ("heterogeneity", "heterogeneity", "groups.csv"),
    ):
        code, document, _ = call(module, *line)
        documented(section, document)
        assert code == 0


@pytest.mark.parametrize(
    ("module", "arguments", "fix"),
    [
        ("table", [], "cruijff-kit table --help lists its arguments"),
        ("table", ["nowhere"], "give the folder of a run or a sweep (multirun/EXPERIMENT/TIME), or one above them"),
        ("table", ["empty"], "cruijff-kit status empty shows active runs"),
        ("status", ["empty"], "give a run's or a sweep's folder"),
        ("status", ["emty"], "did you mean empty?"),
        (
            "status",
            ["--wach", "empty"],
            "did you mean --watch? cruijff-kit status --help lists its arguments",
        ),
        ("export", ["x", "--to", "y", "--epoch", "no"], "cruijff-kit export --help lists its arguments"),
        ("evaluate", ["epmty"], "did you mean empty?"),
        ("evaluate", ["empty", "eval.limit=3"], "give a run's or a sweep's folder"),
        ("evaluate", ["out", "eval.limt=3"], "did you mean eval.limit?"),
        ("resume", ["empty", "slurm.tme=1"], "did you mean slurm.time?"),
        ("data", ["prevew"], "did you mean cruijff-kit data preview?"),
        ("data preview", ["lora.rnk=3"], "did you mean lora.rank?"),
        ("train", ["lora.rnk=3"], "did you mean lora.rank?"),
        ("train", ["-m", "lrr=3,4"], "did you mean lr?"),
        ("train", ["--confg-dir", "x"], "did you mean --config-dir? --help shows every flag"),
        ("train", ["-m", "seed=1,2", "torchtune.seed=1"], "set seed=1 instead"),
    ],
)
def test_refusals_say_what_to_type(sweep, call, documented, module, arguments, fix):
    (call.cwd / "empty").mkdir(exist_ok=True)
    answered = call(module, *arguments)
    assert checked_error(answered, 2, "user")["fix"] == fix
    documented("error", answered[1])


def test_a_run_again_its_model_and_its_archive(sweep, call, documented):
    run = str(sweep[3] / "lr=0.001")
    for section, line in {
        "reproduce, check": ["reproduce", run, "--check"],
        "reproduce": ["reproduce", run, "--to", "again"],
        "compare": ["compare", run],
        "report": ["report", "out"],
        "report, methods": ["report", "out", "--methods"],
        "embed": ["embed", run, "--text", "one", "--text", "two", "--to", "e.parquet"],
        "archive": ["archive", "out", "--dry-run"],
    }.items():
        code, document, _ = call(*line)
        assert code == 0, document
        documented(section, document)
    assert checked_error(call("archive", "out"), 2, "user")["fix"]
    assert checked_error(call("embed", run, "--to", "e.parquet", "--layers", "99"), 2, "user")


def test_no_slurm_is_the_cluster(call, monkeypatch, tmp_path):
    """Exit code 3, also of a submission and of its dry run; nothing is left."""
    for module, *line in (
        ("doctor",),
        ("train", "slurm=cluster", "hydra.run.dir=gone"),
        ("train", "-m", "slurm=cluster", "seed=1,2", "dry_run=true"),
    ):
        monkeypatch.setenv("PATH", str(tmp_path))
        error = checked_error(call(module, *line), 3, "cluster")
        assert "on this machine" in error["message"] and error["fix"].startswith("use a machine with SLURM's commands")
    assert not (call.cwd / "gone").exists()


def test_ctrl_c(call, environment, tiny):
    line = [
        sys.executable,
        "-m",
        "cruijff_kit.train",
        "--json",
        "-m",
        "seed=1,2",
        "hydra.sweep.dir=stopped",
        "epochs=5000",
    ]
    line += ["model=hf_llama", f"model.path={tiny}", *SMALL]
    process = subprocess.Popen(
        line, cwd=call.cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    metrics = call.cwd / "stopped" / "seed=1" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists():
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    document = json.loads(out)
    error = checked_error((process.returncode, document, err.decode()), 130, "interrupted")
    assert error["fix"] == f"cruijff-kit resume {call.cwd / 'stopped'}"
    assert {r["status"] for r in document["runs"]} == {"interrupted"}


def test_stdout_is_one_document_whatever_is_printed(capfd):
    """Also by a child process, and a number that is not finite is null."""

    def noisy() -> dict:
        print("for people")
        os.write(1, b"from C\n")
        subprocess.run(["echo", "from a child"], check=True)
        json_output.record(before=1)
        return {"lost": float("nan"), "far": [float("inf")], "where": call}

    assert run_command(lambda: {**noisy(), "where": os.sep}, as_json=True) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"before": 1, "lost": None, "far": [None], "where": "/"}
    assert all(line in err for line in ("for people", "from C", "from a child"))


def test_nothing_is_kept_without_json(capsys):
    json_output.record(a=1)
    json_output.append(b=[1])
    assert run_command(lambda: {"c": 1}) == 0 and capsys.readouterr().out == ""
    assert json_output.get("a") is None


@pytest.mark.parametrize(
    ("message", "fix"),
    [
        ("lora.rank must be at least 1, not 0 (in run rank=0; nothing was started)", None),
        ("sbatch: no (a; b) there; override slurm.mem; nothing was submitted", "override slurm.mem"),
        ("seed is filled; set seed=1 instead (in run seed=1; nothing was started)", "set seed=1 instead"),
        ("nothing to be done", None),
    ],
)
def test_the_fix_in_a_message(message, fix):
    assert json_output.extract_fix(message) == fix


@pytest.mark.parametrize("ours", [(False, False), (True, False), (False, True), (True, True)])
def test_only_a_terminal_is_asked(ours):
    """stdin and stdout must both be one; a program that waits for JSON is never asked."""
    code = "import sys; from cruijff_kit.util import json_output as out\n"
    code += "print('asks' if out.is_tty() else 'does not')\n"
    code += "with out.capture(): sys.exit(7 * out.is_tty())"
    main, terminal = pty.openpty()
    stdin, stdout = (
        terminal if tty else default for tty, default in zip(ours, (subprocess.DEVNULL, None), strict=True)
    )
    done = subprocess.run(
        [sys.executable, "-c", code], stdin=stdin, stdout=stdout or subprocess.PIPE, stderr=terminal, timeout=60
    )
    said = os.read(main, 100) if stdout else done.stdout
    assert said.split()[0] == (b"asks" if all(ours) else b"does") and done.returncode == 0
    os.close(main)
    os.close(terminal)


def test_the_page_has_every_command(documented):
    assert {name.partition(",")[0] for name in documented.sections} >= {*COMMANDS}
