"""`python -m cruijff_kit.archive`: what is kept, what is deleted, and that nothing goes before its copy is verified."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from cruijff_kit import archive as module
from cruijff_kit.archive import main
from cruijff_kit.archive_manifest import read_manifest
from cruijff_kit.evaluate import main as evaluate
from cruijff_kit.export import main as export
from cruijff_kit.folder import write_text
from cruijff_kit.ledger import read_ledger
from cruijff_kit.status import main as status
from cruijff_kit.table import main as table

SMALL = ["dataset.max_samples=16", "num_warmup_steps=1", "device=cpu", "dtype=fp32", "epochs=2", "eval.limit=6"]


@pytest.fixture(scope="module")
def made(tiny, run_cli, tmp_path_factory) -> Path:
    """A sweep of two runs; lr=0.01 is the best one."""
    folder = tmp_path_factory.mktemp("sweeps")
    settings = ["model=hf_llama", f"model.path={tiny}", *SMALL, "lr=1e-2,1e-6", "hydra.sweep.dir=sweep", "lora.rank=4"]
    done = run_cli("-m", *settings, cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "sweep"


@pytest.fixture
def sweep(made, tmp_path) -> Path:
    """A copy of it, with what else a run can hold."""
    folder = Path(shutil.copytree(made, tmp_path / "sweep"))
    for place in ("merged/epoch_1/model.safetensors", "checkpoint/step_3/state.pt", "report/index.html", "notes.md"):
        write_text(folder / "lr=1e-06" / place, place)
    return folder


@pytest.fixture
def archive(capsys):
    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def adapters(folder: Path) -> list[str]:
    return sorted(p.parent.relative_to(folder).as_posix() for p in folder.rglob("adapter_model.safetensors"))


EVERY = ["lr=0.01/epoch_0", "lr=0.01/epoch_1", "lr=1e-06/epoch_0", "lr=1e-06/epoch_1"]


@pytest.mark.parametrize(
    ("keep", "kept"), [([], ["lr=0.01/epoch_1"]), (["--keep", "all"], EVERY), (["--keep", "none"], [])]
)
def test_in_place(sweep, archive, keep, kept):
    before = contents(sweep)
    code, out, _ = archive(sweep, *keep, "--yes", "--json")
    report, after = json.loads(out), contents(sweep)
    assert code == 0 and adapters(sweep) == report["kept_adapters"] == kept
    gone = set(before) - set(after)
    assert {"lr=1e-06/merged/epoch_1/model.safetensors", "lr=1e-06/checkpoint/step_3/state.pt"} <= gone
    assert all("/epoch_" in g or "/checkpoint/" in g for g in gone) and report["freed_bytes"] == sum(
        len(before[g]) for g in gone
    )
    assert {k: v for k, v in before.items() if k in after} == {k: v for k, v in after.items() if k != "archive.json"}
    manifest = read_manifest(sweep)
    assert {d.path for d in manifest.deleted} == {d["path"] for d in report["deleted"]} and manifest.state == "done"
    for path, known in manifest.files.items():
        assert known == {"sha256": hashlib.sha256(before[path]).hexdigest(), "bytes": len(before[path])}
    for deleted in manifest.deleted:
        expected = {f"{deleted.path}/{name}": digest for name, digest in deleted.files.items()}
        assert all(hashlib.sha256(before[path]).hexdigest() == digest for path, digest in expected.items())
        assert bool(deleted.files) == ("epoch_" in Path(deleted.path).name)


def test_a_dry_run_changes_nothing(sweep, archive, tmp_path):
    before = contents(tmp_path)
    code, out, _ = archive(sweep, "--to", tmp_path / "kept", "--dry-run")
    assert code == 0 and contents(tmp_path) == before
    assert "would be deleted: 5 folders" in out and "lr=1e-06/merged" in out and "adapter lr=0.01/epoch_1" in out


def test_a_copy_that_stands_alone(sweep, archive, tmp_path, capsys):
    """Every file the same, and table, status, evaluate and export say what is the case, with the sweep's folder gone."""
    before, kept = contents(sweep), tmp_path / "elsewhere" / "kept"
    assert archive(sweep, "--to", kept, "--yes")[0] == 0
    copied = {k: v for k, v in contents(kept).items() if k != "archive.json"}
    apart = ("archive.json", ".sweep.json.lock")
    assert copied == {k: v for k, v in contents(sweep).items() if k not in apart}
    assert copied.items() <= before.items() and adapters(kept) == ["lr=0.01/epoch_1"]
    assert not [k for k in copied if k.endswith(".lock")]
    shutil.rmtree(sweep)
    assert table([str(kept), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [len(r["comparisons"]) > 0 for r in results] == [True, True], "the logs are found where they lie now"
    assert status([str(kept)]) == 0 and "2 done" in capsys.readouterr().out
    assert len(read_ledger(kept).runs) == 2
    assert evaluate([str(kept / "lr=1e-06"), "eval=match"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "was archived away" in said and f"python -m cruijff_kit.reproduce {kept / 'lr=1e-06'}" in said
    assert evaluate([str(kept / "lr=0.01"), "eval=match"]) == 0
    capsys.readouterr()
    for run, more in (("lr=1e-06", []), ("lr=0.01", ["--epoch", "0"])):
        assert export([str(kept / run), *more, "--to", str(tmp_path / "x")]) == 2
        assert "was archived away" in capsys.readouterr().err
    assert export([str(kept / "lr=0.01"), "--to", str(tmp_path / "x")]) == 0


@pytest.mark.parametrize("step", ["copying", "comparing", "deleting"])
def test_what_was_cut_short_can_be_done_again(sweep, archive, tmp_path, monkeypatch, step):
    """Killed in the middle of copying or of deleting, or a copy that is not right: nothing is lost, and again finishes."""
    before, kept, calls = contents(sweep), tmp_path / "kept", []
    real = {"copy2": shutil.copy2, "rmtree": shutil.rmtree}

    def break_off(name):
        def broken(source, *more, **options):
            calls.append(source)
            if len(calls) == 2 and step != "comparing":
                raise KeyboardInterrupt
            done = real[name](source, *more, **options)
            if len(calls) == 2:
                Path(more[0]).write_bytes(b"a bad disk")
            return done

        return broken

    name = "rmtree" if step == "deleting" else "copy2"
    with monkeypatch.context() as patch:
        patch.setattr(module.shutil, name, break_off(name))
        code, _, err = archive(sweep, "--to", kept, "--yes")
    assert code == (1 if step == "comparing" else 130)
    if step != "deleting":
        assert {k: v for k, v in contents(sweep).items() if k != "archive.json"} == before, "nothing was deleted"
    assert (step != "comparing") or "is not what it was made of; nothing was deleted" in err
    assert archive(sweep, "--to", kept, "--yes")[0] == 0
    assert adapters(sweep) == adapters(kept) == ["lr=0.01/epoch_1"]
    assert {d.path for d in read_manifest(kept).deleted} == {
        "lr=0.01/epoch_0", "lr=1e-06/epoch_0", "lr=1e-06/epoch_1", "lr=1e-06/merged", "lr=1e-06/checkpoint",
    }  # fmt: skip
    assert all(d.files for d in read_manifest(kept).deleted if "epoch_" in d.path)
    assert all(before[k] == v for k, v in contents(kept).items() if k != "archive.json")


def test_links_are_not_followed(sweep, archive, tmp_path):
    write_text(tmp_path / "outside" / "precious.txt", "mine")
    shutil.rmtree(sweep / "lr=1e-06" / "epoch_0")
    (sweep / "lr=1e-06" / "epoch_0").symlink_to(tmp_path / "outside")
    (sweep / "lr=1e-06" / "merged" / "there").symlink_to(tmp_path / "outside")
    (sweep / "data").symlink_to(tmp_path / "outside")
    code, out, _ = archive(sweep, "--to", tmp_path / "kept", "--yes", "--json")
    assert code == 0 and json.loads(out)["links"] == ["data", "lr=1e-06/epoch_0"]
    assert (tmp_path / "outside" / "precious.txt").read_text() == "mine" and not list(
        (tmp_path / "kept").rglob("precious.txt")
    )


def test_the_best_run_saved_no_adapter(sweep, archive):
    for epoch in (0, 1):
        shutil.rmtree(sweep / "lr=0.01" / f"epoch_{epoch}")
    assert archive(sweep, "--yes")[0] == 0 and adapters(sweep) == []


def test_a_single_run_is_its_own_best(sweep, archive):
    assert archive(sweep / "lr=1e-06", "--yes")[0] == 0
    assert adapters(sweep) == ["lr=0.01/epoch_0", "lr=0.01/epoch_1", "lr=1e-06/epoch_1"]


def change(run: Path, name: str, **fields: object) -> None:
    tree = json.loads((run / name).read_text())
    write_text(run / name, json.dumps(tree | fields))


def interrupted(sweep):
    for name, field in (("status.json", "state"), ("result.json", "status")):
        change(sweep / "lr=0.01", name, **{field: "interrupted"})


def active(sweep):
    import os
    import socket

    from cruijff_kit.result import now

    change(
        sweep / "lr=0.01", "status.json", state="running", pid=os.getpid(), host=socket.gethostname(), heartbeat=now()
    )


def unreadable(sweep):
    write_text(sweep / "lr=0.01" / "result.json", "{")


def without_result(sweep):
    (sweep / "lr=0.01" / "result.json").unlink()


def waiting(sweep):
    write_text(sweep / "lr=0.01" / "evaluate.json", "{}")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (interrupted, "lr=0.01 is interrupted, and only what is done or failed can be archived"),
        (active, "lr=0.01 is running, and only what is done or failed can be archived"),
        (unreadable, "is not a result of this version"),
        (without_result, "is done but has no result.json"),
        (waiting, "waits for an evaluation"),
    ],
)
def test_what_is_not_finished_is_refused(sweep, archive, spoil, message):
    spoil(sweep)
    before = contents(sweep)
    code, _, err = archive(sweep, "--yes")
    assert code == 2 and message in err.splitlines()[-1] and contents(sweep) == before


def test_a_failed_run_and_no_best_one(sweep, archive):
    for run in ("lr=0.01", "lr=1e-06"):
        change(sweep / run, "result.json", status="failed")
        change(sweep / run, "status.json", state="failed")
    assert "no run is done" in archive(sweep, "--yes")[2] and adapters(sweep) == EVERY
    assert archive(sweep, "--keep", "none", "--yes")[0] == 0 and adapters(sweep) == []


def test_refused(sweep, archive, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert "add --yes" in archive(sweep)[2] and adapters(sweep) == EVERY
    assert "neither folder may lie in the other" in archive(sweep, "--to", sweep / "kept", "--yes")[2]
    assert "neither folder may lie in the other" in archive(sweep, "--to", tmp_path, "--yes")[2]
    write_text(tmp_path / "other" / "a", "b")
    assert "holds something else already" in archive(sweep, "--to", tmp_path / "other", "--yes")[2]
    assert "no such folder" in archive(tmp_path / "nowhere", "--yes")[2]
    assert "holds no runs" in archive(tmp_path / "other", "--yes")[2] and adapters(sweep) == EVERY
