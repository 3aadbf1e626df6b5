"""`cruijff-kit archive`: what is kept, what is deleted, and that nothing goes before its copy is verified."""

import hashlib
import json
import shutil
from pathlib import Path
from urllib.parse import unquote

import pytest

from cruijff_kit import compose, train_then_eval
from cruijff_kit.commands import archive as module
from cruijff_kit.commands.archive import main
from cruijff_kit.commands.evaluate import main as evaluate
from cruijff_kit.commands.export import main as export
from cruijff_kit.commands.reproduce import main as reproduce
from cruijff_kit.commands.status import main as status
from cruijff_kit.commands.table import main as table
from cruijff_kit.records.archive_manifest import read_manifest
from cruijff_kit.records.sweep_manifest import read_sweep_manifest
from cruijff_kit.util.files import write_text


@pytest.fixture
def sweep(trained_sweep, tmp_path) -> Path:
    """A copy of a finished one, with what else a run can hold."""
    folder = Path(shutil.copytree(trained_sweep, tmp_path / "sweep"))
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


WRITTEN = ("archive.json", "ro-crate-metadata.json")
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
    assert {k: v for k, v in before.items() if k in after} == {k: v for k, v in after.items() if k not in WRITTEN}
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
    copied = {k: v for k, v in contents(kept).items() if k not in WRITTEN}
    apart = (*WRITTEN, ".sweep.json.lock")
    assert copied == {k: v for k, v in contents(sweep).items() if k not in apart}
    assert copied.items() <= before.items() and adapters(kept) == ["lr=0.01/epoch_1"]
    assert not [k for k in copied if k.endswith(".lock")]
    shutil.rmtree(sweep)
    assert table([str(kept), "--json"]) == 0
    results = json.loads(capsys.readouterr().out)
    assert [len(r["comparisons"]) > 0 for r in results["runs"]] == [True, True], "the logs are found where they lie now"
    assert status([str(kept)]) == 0 and "2 done" in capsys.readouterr().out
    assert len(read_sweep_manifest(kept).runs) == 2
    assert evaluate([str(kept / "lr=1e-06"), "eval=match"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "was deleted by archive" in said and f"cruijff-kit reproduce {kept / 'lr=1e-06'}" in said
    assert evaluate([str(kept / "lr=0.01"), "eval=match"]) == 0
    capsys.readouterr()
    for run, more in (("lr=1e-06", []), ("lr=0.01", ["--epoch", "0"])):
        assert export([str(kept / run), *more, "--to", str(tmp_path / "x")]) == 2
        assert "was deleted by archive" in capsys.readouterr().err
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
    assert (step != "comparing") or "differs from its source; nothing was deleted" in err
    assert archive(sweep, "--to", kept, "--yes")[0] == 0
    assert adapters(sweep) == adapters(kept) == ["lr=0.01/epoch_1"]
    assert {d.path for d in read_manifest(kept).deleted} == {
        "lr=0.01/epoch_0", "lr=1e-06/epoch_0", "lr=1e-06/epoch_1", "lr=1e-06/merged", "lr=1e-06/checkpoint",
    }  # fmt: skip
    assert all(d.files for d in read_manifest(kept).deleted if "epoch_" in d.path)
    assert all(before[k] == v for k, v in contents(kept).items() if k not in WRITTEN)


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

    from cruijff_kit.util.format import now

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
        (interrupted, "lr=0.01 is interrupted, and only done or failed runs can be archived"),
        (active, "lr=0.01 is running, and only done or failed runs can be archived"),
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
    assert "neither folder may contain the other" in archive(sweep, "--to", sweep / "kept", "--yes")[2]
    assert "neither folder may contain the other" in archive(sweep, "--to", tmp_path, "--yes")[2]
    write_text(tmp_path / "other" / "a", "b")
    assert "is not empty" in archive(sweep, "--to", tmp_path / "other", "--yes")[2]
    assert "no such folder" in archive(tmp_path / "nowhere", "--yes")[2]
    assert "holds no runs" in archive(tmp_path / "other", "--yes")[2] and adapters(sweep) == EVERY


def graph(folder: Path) -> dict[str, dict]:
    """Entities of an archive's description by their id."""
    described = json.loads((folder / "ro-crate-metadata.json").read_text(encoding="utf-8"))
    assert described["@context"] == "https://w3id.org/ro/crate/1.1/context"
    found = {entity["@id"]: entity for entity in described["@graph"]}
    assert len(found) == len(described["@graph"]), "no id twice"
    return found


def ids(value) -> list[str]:
    return [v["@id"] for v in (value if isinstance(value, list) else [value])]


def test_the_archive_is_described_for_others(sweep, archive, tmp_path):
    """By the rules of RO-Crate: what it is, each file that is there with hash and size, each run as what made its files."""
    code, out, err = archive(
        sweep, "--to", tmp_path / "kept", "--yes", "--json", "--license", "https://spdx.org/licenses/MIT"
    )
    assert code == 0, err
    assert json.loads(out)["crate"] == str(tmp_path / "kept" / "ro-crate-metadata.json")
    for place in (sweep, tmp_path / "kept"):
        found = graph(place)
        assert ids(found["ro-crate-metadata.json"]["about"]) == ["./"] and found["./"]["@type"] == "Dataset"
        assert found["./"]["name"] == "capitalization" and "2 fine-tuning runs of llama" in found["./"]["description"]
        assert found["./"]["license"] == {"@id": "https://spdx.org/licenses/MIT"} and found["./"]["datePublished"]
        parts = {unquote(part): found[part] for part in ids(found["./"]["hasPart"])}
        there = {k: v for k, v in contents(place).items() if not k.endswith((".lock", "ro-crate-metadata.json"))}
        assert set(parts) == set(there)
        for name, content in there.items():
            if name != "archive.json":
                assert parts[name]["sha256"] == hashlib.sha256(content).hexdigest()
                assert parts[name]["contentSize"] == str(len(content)) and parts[name]["encodingFormat"]
        actions = {e["name"]: e for e in found.values() if e["@type"] == "CreateAction"}
        assert {*actions} == {"lr=0.01", "lr=1e-06"} and set(ids(found["./"]["mentions"])) == {
            e["@id"] for e in actions.values()
        }
        run = actions["lr=0.01"]
        assert {unquote(i) for i in ids(run["result"])} == {n for n in there if n.startswith("lr=0.01/")}
        assert all(i in found for i in [*ids(run["object"]), *ids(run["instrument"]), *ids(run["result"])])
        assert run["endTime"] > run["startTime"] and ids(run["actionStatus"]) == [
            "http://schema.org/CompletedActionStatus"
        ]
        result = json.loads((place / "lr=0.01" / "result.json").read_text())
        assert {found[i].get("identifier") for i in ids(run["object"])} == {result["model_hash"], result["data_hash"]}


def test_the_description_can_be_read_by_the_library(sweep, archive):
    from rocrate.rocrate import ROCrate

    assert archive(sweep, "--yes")[0] == 0
    crate = ROCrate(sweep)
    assert crate.name == "capitalization" and crate.license == "No licence was named; ask the authors."
    assert len(crate.data_entities) > 20 and (sweep / unquote(crate.data_entities[0].id)).is_file()


def test_one_run_is_described_too(sweep, archive):
    assert archive(sweep / "lr=0.01", "--yes")[0] == 0
    found = graph(sweep / "lr=0.01")
    (action,) = (e for e in found.values() if e["@type"] == "CreateAction")
    assert "result.json" in ids(action["result"])


@pytest.fixture
def with_data(tiny, tmp_path):
    """A function: dataset.path, files to write below my/ and overrides -> a finished run in a folder of its own."""

    def made(path, files: dict[str, str], *overrides: str) -> Path:
        for name, text in files.items():
            write_text(tmp_path / "my" / name, text)
        data = ["dataset=files", f"dataset.path={path}"] if path else []
        where = ["model=hf_llama", f"model.path={tiny}", *data, "eval=none", "epochs=1"]
        small = ["device=cpu", "dtype=fp32", "num_warmup_steps=0", "dataset.validation_split=null", "lora.rank=2"]
        number = len([*tmp_path.glob("run*")])
        output = tmp_path / f"run{number}" / "r"
        train_then_eval(compose([*where, *small, f"output_dir={output}", f"run_name=r{number}", *overrides]))
        return output

    return made


ROWS = "input,output\na,b\nc,d\n"


@pytest.mark.parametrize(
    ("path", "files", "copies"),
    [
        ("{my}/d.csv", {"d.csv": ROWS, "other.csv": "x"}, ["d.csv"]),
        ("{my}/folder", {"folder/train.csv": ROWS, "folder/test.csv": ROWS, "folder/notes.txt": "x"},
         ["folder/test.csv", "folder/train.csv"]),
        ("{{train: {my}/one/d.csv, test: {my}/two/d.csv}}", {"one/d.csv": ROWS, "two/d.csv": ROWS + "e,f\n"},
         ["0/one/d.csv", "1/two/d.csv"]),
    ],
)  # fmt: skip
def test_green_data_goes_with_it_on_request(with_data, archive, tmp_path, capsys, path, files, copies):
    """And a run is made again from the archive alone."""
    run = with_data(path.format(my=tmp_path / "my"), files)
    result = json.loads((run / "result.json").read_text())
    assert archive(run, "--to", tmp_path / "plain", "--yes")[0] == 0 and not (tmp_path / "plain" / "data").exists()
    shutil.rmtree(tmp_path / "plain")
    code, out, _ = archive(run, "--to", tmp_path / "kept", "--data", "--yes", "--json")
    (known,) = json.loads(out)["data"]
    below = tmp_path / "kept" / "data" / result["data_hash"]
    assert code == 0 and known["files"] == [f"data/{result['data_hash']}/{c}" for c in copies]
    assert sorted(p.relative_to(below).as_posix() for p in below.rglob("*") if p.is_file()) == sorted(["TIER", *copies])
    assert (below / "TIER").read_text() == "green\n"
    assert {f"data/{result['data_hash']}/{c}" for c in copies} <= {unquote(i) for i in graph(tmp_path / "kept")}
    assert not [i for i in graph(run) if i.startswith("data/")], "it is in the copy only"
    shutil.rmtree(tmp_path / "my")
    assert reproduce([str(run), "--check"]) == 2, "the data is gone"
    capsys.readouterr()
    assert reproduce([str(tmp_path / "kept"), "--to", str(tmp_path / "again")]) == 0
    assert "identical" in capsys.readouterr().out


def test_data_of_several_runs_is_copied_once(with_data, archive, tmp_path):
    path = tmp_path / "my" / "d.csv"
    runs = [with_data(path, {"d.csv": ROWS}), with_data(path, {})]
    drawn = with_data(None, {}, "dataset.max_samples=4")
    (tmp_path / "all").mkdir()
    for run in (*runs, drawn):
        run.rename(tmp_path / "all" / run.parent.name)
    code, out, err = archive(tmp_path / "all", "--to", tmp_path / "kept", "--data", "--keep", "all", "--yes", "--json")
    assert code == 0, err
    assert len(json.loads(out)["data"]) == 2 and len([*(tmp_path / "kept" / "data").iterdir()]) == 2
    again = archive(tmp_path / "all", "--to", tmp_path / "kept", "--keep", "all", "--yes")
    assert again[0] == 0 and len(read_manifest(tmp_path / "kept").data) == 2, "what is there stays known"


def test_sensitive_data_stays_where_it_is(with_data, archive, tmp_path):
    """Yellow data goes along where the runs name who allowed it; red data never, also where it was marked since."""
    path = tmp_path / "my" / "d.csv"
    yellow = with_data(path, {"d.csv": ROWS}, "dataset.tier=yellow", "agent=false")
    code, _, err = archive(yellow, "--to", tmp_path / "kept", "--data", "--yes")
    assert code == 2 and "is yellow, and its result.json names nobody who allowed its use" in err
    assert not (tmp_path / "kept").exists() and adapters(yellow) == ["epoch_0"]
    change(yellow, "result.json", permission="Ann Lee, 3 May 2026")
    assert archive(yellow, "--to", tmp_path / "kept", "--data", "--yes")[0] == 0
    assert [p.read_text() for p in (tmp_path / "kept" / "data").rglob("TIER")] == ["yellow\n"]
    write_text(tmp_path / "my" / "TIER", "red\n")
    code, _, err = archive(yellow, "--to", tmp_path / "red", "--data", "--yes")
    assert code == 2 and "is red, and red data is never copied" in err and not (tmp_path / "red").exists()
    assert archive(yellow, "--to", tmp_path / "without", "--yes")[0] == 0


def test_data_that_is_not_what_it_was(with_data, archive, tmp_path):
    path = tmp_path / "my" / "d.csv"
    run = with_data(path, {"d.csv": ROWS})
    assert "name it: --to DIR2" in archive(run, "--data", "--yes")[2]
    path.write_text(ROWS + "x,y\n")
    assert "is not what" in archive(run, "--to", tmp_path / "kept", "--data", "--yes")[2]
    path.unlink()
    assert "put it back, or leave --data out" in archive(run, "--to", tmp_path / "kept", "--data", "--yes")[2]
    assert not (tmp_path / "kept").exists() and adapters(run) == ["epoch_0"]
    path.write_text(ROWS)
    code, out, _ = archive(run, "--to", tmp_path / "kept", "--data", "--dry-run")
    assert code == 0 and f"data {path} (green, {len(ROWS)} B)" in out and not (tmp_path / "kept").exists()
