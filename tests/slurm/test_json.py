"""What the commands answer to programs about a cluster: submitted, refused, waited for; docs/json.md has the shapes."""

import json

import pytest
from slurm_shell import TINY

HOLD = "slurm.additional_parameters.hold=true"


@pytest.fixture
def ask(shell):
    """A function: command, arguments -> the exit code and the one document."""

    def asked(module: str, *arguments: str) -> tuple[int, dict]:
        done = shell.run(module, *arguments, "--json")
        assert "Traceback" not in done.stderr
        return done.returncode, json.loads(done.stdout)

    return asked


def test_submitted_looked_at_and_cancelled(shell, ask, documented):
    code, document = ask("train", "-m", "slurm=cluster", *TINY, "seed=1,2", HOLD, "hydra.sweep.dir=out")
    documented("train", document)
    assert code == 0 and document["runs"] == [] and document["folder"] == str(shell.cwd / "out")
    views = shell.views(shell.cwd / "out")
    ids = {s["name"]: s["job_id"] for s in document["submitted"]}
    assert ids == {name: v["job_id"] for name, v in views.items()} and set(ids) == {"seed=1", "seed=2"}
    code, again = ask("train", "-m", "slurm=cluster", *TINY, "seed=1,2", HOLD, "hydra.sweep.dir=out")
    assert code == 0 and again["submitted"] == [] and {e["state"] for e in again["existing"]} == {"queued"}
    code, refused = ask("cancel", "out")
    assert code == 2 and refused["error"]["fix"] == "add --yes"
    code, document = ask("cancel", "out", "seed=2", "--yes")
    documented("cancel", document)
    assert code == 0 and document["cancelled"] == [
        {"name": "seed=2", "folder": views["seed=2"]["folder"], "job_id": ids["seed=2"]}
    ]
    code, document = ask("resume", "out")
    documented("resume", document)
    assert code == 0 and (document["to_finish"], document["active"]) == (["seed=2"], ["seed=1"])
    (submitted,) = document["submitted"]
    assert submitted["name"] == "seed=2" and submitted["job_id"] != ids["seed=2"]
    assert {s["name"]: s["state"] for s in document["states"]} == {"seed=1": "queued", "seed=2": "queued"}


def test_what_does_not_fit_into_the_queue(ask):
    """Exit code 3, and the document has what was submitted."""
    line = ["-m", "slurm=cluster", *TINY, "seed=range(1,6)", "slurm.qos=few", HOLD, "hydra.sweep.dir=out"]
    code, document = ask("train", *line)
    assert code == 3 and document["error"]["type"] == "cluster" and len(document["submitted"]) == 3
    assert document["error"]["fix"] == "submit the rest later: cruijff-kit resume out"


def test_refused(ask, documented):
    line = ["-m", "slurm=cluster", *TINY, "seed=1,2", "slurm.partition=nowhere"]
    code, document = ask("train", *line)
    documented("error", {"error": document["error"]})
    assert code == 3 and document["error"]["fix"].startswith("override slurm.partition (there are: cpu, gpu, preempt)")
    code, document = ask("train", *line, "dry_run=true")
    assert code == 3 and document["error"]["type"] == "cluster"
    assert [a["refused"] for a in document["arrays"]] == [True] and len(document["runs"]) == 2


def test_dry_run_and_doctor(ask, documented):
    code, document = ask("train", "-m", "slurm=cluster", *TINY, "seed=1,2", "slurm.cpus=1,2", "dry_run=true")
    documented("train, dry run", document)
    assert code == 0 and ["#SBATCH --array=0-1%2" in a["script"] for a in document["arrays"]] == [True, True]
    assert not any(a["refused"] for a in document["arrays"]) and "to start at" in document["arrays"][0]["test_only"]
    code, document = ask("doctor")
    documented("doctor", document)
    assert code == 0 and document["name"] == "test"


def test_waited_for_and_its_log(ask, documented, shell):
    """The results of what was submitted, a run that failed among them; the lines that it printed."""
    line = ["slurm=cluster", "slurm.wait=true", *TINY, "lr=1e-3,1e30", "lr_scheduler=constant", "epochs=3"]
    code, document = ask("main", "train", "-m", *line, "hydra.sweep.dir=out")  # as `cruijff-kit train`
    assert code == 1 and document["error"]["message"] == "1 of 2 runs failed"
    assert sorted(r["status"] for r in document["runs"]) == ["done", "failed"] and len(document["submitted"]) == 2
    code, document = ask("logs", "out", "lr=0.001", "--follow")
    documented("logs", document)
    assert code == 0 and any("done: validation_loss" in line for line in document["lines"])
    code, document = ask("evaluate", shell.cwd / "out", "eval=match", "eval.limit=2", "eval.baseline=false")
    documented("evaluate", document)
    assert code == 0 and [s["name"] for s in document["submitted"]] == ["lr=0.001"] and document["made"] == []
