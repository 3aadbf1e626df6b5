"""`cruijff-kit doctor` on real clusters: what it finds, what it says, and the YAML it leaves."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cruijff_kit.slurm import client, probe_job, site


@pytest.fixture
def doctor(environment, tmp_path):
    """Calls the command on a cluster, in a folder; returns what subprocess.run does."""

    def run(cluster, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cruijff_kit", "doctor", *arguments]
        variables = environment | cluster.environment | more
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)

    return run


def facts_of(done: subprocess.CompletedProcess[str]) -> dict:
    """What --json printed."""
    assert done.returncode in (0, 1), done.stderr
    return json.loads(done.stdout)


def said(facts: dict, level: str) -> str:
    """The findings of one level."""
    return "\n".join(v["text"] for v in facts["findings"] if v["level"] == level)


def test_report_with_accounting(doctor, slurm, tmp_path):
    done = doctor(slurm)
    assert (done.returncode, done.stderr) == (0, "")
    for text in ("cpu*", "few: MaxSubmitPU=3", "the default partition cpu has no GPU: slurm.partition=gpu", "lab*"):
        assert text in done.stdout
    assert "problem" not in done.stdout
    assert not list(tmp_path.iterdir())


def test_facts_with_accounting(doctor, slurm):
    facts = facts_of(doctor(slurm, "--json", "--account=other", "--qos=few"))
    gpu = next(p for p in facts["partitions"] if p["name"] == "gpu")
    assert (gpu["nodes"], gpu["nodes_up"], gpu["cpus"], gpu["memory_mb"]) == (2, 2, [8], [16000])
    assert gpu["gpus"] == {"": 4} and gpu["features"] == ["a100"] and gpu["max_time"] == "1-00:00:00"
    assert [p["name"] for p in facts["partitions"] if p["default"]] == ["cpu"]
    assert facts["max_array_size"] == 2001 and facts["accounting"]
    assert facts["default_account"] == "lab"
    assert {a["name"]: a["limits"] for a in facts["accounts"]}["other"] == {"GrpJobs": "1"}
    assert facts["qos"]["short"] == {"MaxWall": "00:10:00", "MaxJobsPU": "2"}
    assert "3 jobs in the queue at once (MaxSubmitPU of qos few)" in said(facts, "warning")
    assert "1 jobs run at once (GrpJobs of account other)" in said(facts, "warning")


def test_report_without_accounting(doctor, slurm_bare):
    facts = facts_of(doctor(slurm_bare, "--json", "--partition=preempt"))
    assert not facts["accounting"] and facts["accounts"] == []
    assert "SLURM soon forgets how a job ended" in said(facts, "warning")
    assert "preempted at once (GraceTime=0)" in said(facts, "warning")
    assert not said(facts, "problem")


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--partition=nope"], "there is no partition nope; there are cpu, gpu, preempt"),
        (["--account=nobody"], "may not charge nobody; accounts: "),
        (["--account=lab", "--qos=nope"], "lab may not use qos nope; it may use few, normal, short"),
    ],
)
def test_what_cannot_work_is_a_problem(doctor, slurm, arguments, problem):
    done = doctor(slurm, "--json", *arguments)
    assert done.returncode == 1
    assert problem in said(facts_of(done), "problem")


def test_job_says_what_the_node_sees(doctor, slurm, cache, tmp_path):
    done = doctor(slurm, "--json", "--job", "--account=other", "--partition=gpu", "--constraint=a100")
    facts = facts_of(done)
    node = facts["node"]
    assert done.returncode == 0, facts["findings"]
    assert node["hostname"] in ("g1", "g2") and node["python"] == sys.executable and node["error"] is None
    assert Path(node["package"]) == Path(client.__file__).parents[1] and node["cache_shared"]
    job = client.key_values(slurm.run("scontrol", "--oneliner", "show", "job", node["job_id"]).stdout)
    assert (job["Account"], job["Partition"], job["JobState"]) == ("other", "gpu", "COMPLETED")
    assert not list(tmp_path.iterdir()) and not list(cache.glob(".doctor*"))


def test_job_with_gpus_tells_that_pytorch_reaches_none(doctor, slurm_bare):
    """The nodes' GPUs are stand-ins."""
    facts = facts_of(doctor(slurm_bare, "--json", "--job", "--gpus=2"))
    assert facts["node"]["hostname"] in ("g1", "g2") and facts["node"]["torch_gpus"] == 0
    assert "PyTorch reaches 0 of 2 GPUs on g" in said(facts, "problem")


def test_job_that_waits_is_cancelled(doctor, slurm_bare, tmp_path):
    every_cpu = ("--exclusive", "--nodes=2", "--nodelist=g1,g2", "-p", "gpu", "--output=/dev/null")
    blocker = slurm_bare.run("sbatch", "--parsable", *every_cpu, "--wrap=sleep 60").stdout.strip()
    try:
        while "State=RUNNING" not in slurm_bare.run("scontrol", "show", "job", blocker).stdout:
            time.sleep(0.05)
        done = doctor(slurm_bare, "--json", "--job", "--partition=gpu", "--wait=2")
        facts = facts_of(done)
        assert done.returncode == 1
        assert "after 2 s the probe job was still PENDING (Resources); cancelled" in said(facts, "problem")
        job = slurm_bare.run("scontrol", "show", "job", facts["node"]["job_id"]).stdout
        assert "JobState=CANCELLED" in job
        assert not list(tmp_path.iterdir())
    finally:
        slurm_bare.run("scancel", blocker)


def test_job_that_is_refused(doctor, slurm):
    done = doctor(slurm, "--json", "--job", "--account=nobody")
    assert done.returncode == 1
    assert "the probe job was refused: Batch job submission failed: Invalid account" in said(facts_of(done), "problem")


def test_preemption_by_qos(slurm, tmp_path, monkeypatch):
    for key, value in slurm.environment.items():
        monkeypatch.setenv(key, value)
    slurm.run("sacctmgr", "-i", "modify", "qos", "normal", "set", "preempt=short")
    slurm.run("sacctmgr", "-i", "modify", "qos", "short", "set", "gracetime=90")
    try:
        assert site.read_site(tmp_path).preempted_qos == {"short": 90}
    finally:
        slurm.run("sacctmgr", "-i", "modify", "qos", "normal", "set", "preempt=")
        slurm.run("sacctmgr", "-i", "modify", "qos", "short", "set", "gracetime=0")


@pytest.mark.parametrize(
    ("line", "on_the_node", "text"),
    [
        ("cd ", "cd /nowhere", "does not see "),
        ("[ -x ", "[ -x /nowhere", "put the environment where all nodes see it"),
        ("--ntasks=1 ", "--ntasks=1 /nowhere", "the probe job ended as FAILED, exit code 2: "),
    ],
)
def test_job_on_a_node_that_sees_less(slurm_bare, tmp_path, monkeypatch, line, on_the_node, text):
    """One line of its script fails, as it does on a node where that is missing."""
    usual = probe_job._script
    monkeypatch.setattr(probe_job, "_script", lambda *arguments: usual(*arguments).replace(line, on_the_node))
    for key, value in slurm_bare.environment.items():
        monkeypatch.setenv(key, value)
    assert text in probe_job.run_probe_job(tmp_path, [], 0, 60).error
    assert not list(tmp_path.iterdir())


def test_an_unreachable_cluster_ends_soon(doctor, slurm_bare, tmp_path):
    conf = Path(slurm_bare.environment["SLURM_CONF"]).read_text()
    (tmp_path / "slurm.conf").write_text(conf.replace(f"SlurmctldPort={slurm_bare.port}", "SlurmctldPort=9"))
    start = time.monotonic()
    done = doctor(slurm_bare, SLURM_CONF=str(tmp_path / "slurm.conf"))
    assert time.monotonic() - start < 30
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_a_machine_without_slurm(environment, tmp_path):
    command = [sys.executable, "-m", "cruijff_kit", "doctor"]
    variables = environment | {"PATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout == ""
    assert done.stderr.startswith("error: there is no scontrol on this machine; ") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("slurm", [], {"account": "lab", "partition": "gpu", "qos": None, "gpus": None}),
        ("slurm", ["--qos=short", "--account=other"], {"account": "other", "qos": "short", "time": "00:10:00"}),
        ("slurm_bare", ["--partition=cpu"], {"account": None, "partition": "cpu", "gpus": 0}),
        ("slurm_bare", ["--account=1e5", "--constraint=a100|h100"], {"account": "1e5", "constraint": "a100|h100"}),
    ],
)
def test_the_yaml_composes(doctor, run_cli, request, tmp_path, name, arguments, expected):
    cluster = request.getfixturevalue(name)
    _, mark, text = doctor(cluster, *arguments).stdout.partition("# test, SLURM ")
    assert mark and "slurm=test" in text
    file = tmp_path / "my_conf" / "slurm" / "test.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(mark + text)
    composed = ("--config-dir", "my_conf", "slurm=test", "--cfg", "job", "--resolve", "--package", "slurm")
    done = run_cli(*composed, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    slurm = yaml.safe_load(done.stdout)
    assert slurm["submit"] is True and {key: slurm[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("(null)", {}),
        ("gpu", {"": 1}),
        ("gpu:4", {"": 4}),
        ("gpu:a100:4(S:0-1),gpu:v100:2(S:0,1),shard:8", {"a100": 4, "v100": 2}),
        ("gpu:1g.5gb:3,shard:gpu:8", {"1g.5gb": 3}),
        ("craynetwork:4,gpu:nvidia_a100_3g.20gb:2(IDX:0,1)", {"nvidia_a100_3g.20gb": 2}),
    ],
)
def test_gpus_of_a_node(gres, gpus):
    assert site.parse_gpus(gres) == gpus


def test_importing_is_light():
    heavy = "('torch', 'pandas', 'inspect_ai')"
    code = f"import sys, cruijff_kit.commands.doctor; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
