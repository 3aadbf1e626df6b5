"""TensorBoard, W&B and MLflow hold what metrics.jsonl holds: read back with their own readers, and never over a network."""

import gc
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest

import cruijff_kit
from cruijff_kit.config.identity import config_hash
from cruijff_kit.recipes.lora_single_device import TrainingInterrupted
from cruijff_kit.records.result import read_result
from cruijff_kit.training.trackers import check_trackers
from cruijff_kit.util.errors import UserError

ALL = "trackers=[tensorboard,wandb,mlflow]"
SMALL = [
    "model=hf_llama", "device=cpu", "dtype=fp32", "dataset.max_samples=40", "num_warmup_steps=2", "lora.rank=4", "lr=1e-2",
    "run_val_every_n_steps=3", "eval.limit=4",
]  # fmt: skip


@pytest.fixture(autouse=True)
def nobodys_account(tmp_path, monkeypatch):
    """No settings of the user's."""
    for name in [n for n in os.environ if n.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb_own"))


@pytest.fixture
def overrides(tiny, tmp_path):
    """A run's overrides, in an experiment's folder below a temporary one."""

    def made(name: str, *more: str) -> list[str]:
        folder = tmp_path / "capitalization" / "now" / name
        return [*SMALL, ALL, f"model.path={tiny}", f"run_name={name}", f"output_dir={folder}", *more]

    return made


@pytest.fixture
def recipe(set_up_recipe, overrides):
    """A recipe that is set up, by name."""
    return lambda name, *more: set_up_recipe(*overrides(name, *more))


def finish(recipe) -> None:
    recipe.train()
    recipe.cleanup()


def in_metrics(run: Path) -> Counter:
    """(name, step, value) of metrics.jsonl; the epoch, too, stands in lines of training and of validation."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return Counter((k, line["step"], x) for line in lines for k, x in line.items() if k != "step")


def in_tensorboard(run: Path) -> tuple[Counter, str]:
    """(name, step, value), and the text of the config."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"tensors": 0}).Reload()
    values, config = Counter(), ""
    for tag in events.Tags()["tensors"]:
        for event in events.Tensors(tag):
            if tag.startswith("config"):
                config = event.tensor_proto.string_val[0].decode()
            else:
                values[tag, event.step, event.tensor_proto.float_val[0]] += 1
    return values, config


def wandb_records(file: Path) -> list:
    """The records of a .wandb file: LevelDB's log format behind seven bytes of W&B's own."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, records, part = file.read_bytes(), [], b""
    assert data.startswith(b":W&B")
    at = 7
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(part))
            part = b""
    return records


def in_wandb(run: Path) -> tuple[Counter, list]:
    """(name, step, value) of the one offline run in a run's folder, and all its records."""
    (file,) = run.glob("wandb/offline-run-*/*.wandb")
    records, values, patience = [], Counter(), time.monotonic() + 20
    while not any(r.HasField("exit") for r in records) and time.monotonic() < patience:
        time.sleep(0.05)  # W&B's own process writes the last records after it was told to finish
        records = wandb_records(file)
    for record in records:
        if record.HasField("history"):
            row = {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in record.history.item}
            step = row.pop("global_step")
            values.update((k, step, v) for k, v in row.items() if not k.startswith("_"))
    return values, records


def mlflow_client(store: Path, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return mlflow.MlflowClient(store.as_uri())


def in_mlflow(run: Path, monkeypatch) -> tuple[Counter, object]:
    """(name, step, value), and the run as MLflow has it."""
    with monkeypatch.context() as patch:
        client = mlflow_client(run.parents[1] / "mlruns", patch)
        (experiment,) = client.search_experiments(filter_string="name = 'capitalization'")
        (found,) = [r for r in client.search_runs([experiment.experiment_id]) if r.info.run_name == run.name]
        histories = [client.get_metric_history(found.info.run_id, key) for key in found.data.metrics]
    return Counter((m.key, m.step, m.value) for h in histories for m in h), found


def rounded(values: Counter) -> Counter:
    """As TensorBoard keeps them, in 32 bits."""
    return Counter({(k, s, struct.unpack("f", struct.pack("f", v))[0]): n for (k, s, v), n in values.items()})


def assert_all_hold(run: Path, monkeypatch) -> None:
    """Each tracker has every number of metrics.jsonl, once."""
    expected = in_metrics(run)
    assert expected and all(n == 1 for (name, _, _), n in expected.items() if name != "epoch")
    assert in_wandb(run)[0] == expected
    assert in_mlflow(run, monkeypatch)[0] == expected
    assert in_tensorboard(run)[0] == rounded(expected)


def test_each_tracker_gets_every_number_and_the_config(recipe, monkeypatch):
    done = recipe("first")
    finish(done)
    run = done.folder.path
    assert_all_hold(run, monkeypatch)
    assert "lora_rank: 4" in in_tensorboard(run)[1]
    (begun,) = [r.run for r in in_wandb(run)[1] if r.HasField("run")][:1]
    assert (begun.project, begun.run_group, begun.display_name) == ("capitalization", "now", "first")
    assert json.loads({u.key: u.value_json for u in begun.config.update}["model"])["lora_rank"] == 4
    _, found = in_mlflow(run, monkeypatch)
    assert found.info.status == "FINISHED" and found.data.params["model.lora_rank"] == "4"
    assert not {"MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_RUN_ID"} & set(os.environ)


def test_runs_of_a_process_are_runs_of_their_own(overrides, monkeypatch):
    """One that fails between two others, too; evaluation's numbers are the last."""
    for name, more in (("one", ()), ("two", ("lr=1e20", "lr_scheduler=constant")), ("three", ("lora.rank=8",))):
        config = cruijff_kit.compose(overrides(name, *more))
        if name == "two":
            with pytest.raises(FloatingPointError):
                cruijff_kit.train_then_eval(config)
            continue
        cruijff_kit.train_then_eval(config)
    runs = {name: Path(config.output_dir).with_name(name) for name in ("one", "two", "three")}
    assert_all_hold(runs["two"], monkeypatch)
    statuses = {name: in_mlflow(run, monkeypatch)[1].info.status for name, run in runs.items()}
    assert statuses == {"one": "FINISHED", "two": "FAILED", "three": "FINISHED"}
    exits = {name: [r.exit.exit_code for r in in_wandb(run)[1] if r.HasField("exit")] for name, run in runs.items()}
    assert exits == {"one": [0], "two": [1], "three": [0]}
    assert len({json.dumps(json.loads((r / "trackers.json").read_text())) for r in runs.values()}) == 3
    for run in (runs["one"], runs["three"]):
        found = read_result(run / "result.json")
        (before,), (after,) = found.baseline, found.evaluation
        results = Counter(
            (f"{kind}/{e.task}/{scorer}/{metric}", found.training["steps"], value)
            for kind, e in (("base_model", before), ("eval", after))
            for scorer, values in e.metrics.items()
            for metric, value in values.items()
        )
        expected = in_metrics(run) + results
        assert len(results) >= 4
        assert in_wandb(run)[0] == expected == in_mlflow(run, monkeypatch)[0]
        assert in_tensorboard(run)[0] == rounded(expected)


def test_a_run_that_is_forgotten_late_does_not_end_the_next(recipe, monkeypatch):
    """torchtune's loggers end whatever run is open when they are collected."""
    first = recipe("one")
    finish(first)
    second = recipe("two")
    run = second.folder.path
    del first
    gc.collect()
    finish(second)
    assert_all_hold(run, monkeypatch)


def stop_at(recipe, step: int, error: BaseException | None) -> None:
    """Ask it to stop in a step, or fail after it as a machine does that dies: nothing is saved."""
    end_step = recipe._end_step

    def counted():
        if recipe.global_step == step:
            if error is not None:
                raise error
            recipe.stop_requested = "asked to"
        end_step()

    recipe._end_step = counted
    with pytest.raises(TrainingInterrupted if error is None else type(error)):
        try:
            recipe.train()
        finally:
            recipe.cleanup()


def test_a_resumed_run_goes_on_in_the_same_run_and_no_step_is_there_twice(recipe, monkeypatch):
    options = ["epochs=2", "checkpoint_every_n_steps=3"]
    begun = recipe("a", *options)
    run = begun.folder.path
    stop_at(begun, 5, MemoryError("as if killed"))
    ids = json.loads((run / "trackers.json").read_text())
    assert set(ids) == {"wandb", "mlflow"}
    first = in_metrics(run)
    stop_at(recipe("a", *options, "resume_from_checkpoint=true"), 8, None)
    last = recipe("a", *options, "resume_from_checkpoint=true")
    assert last.global_step == 8
    finish(last)
    assert json.loads((run / "trackers.json").read_text()) == ids
    timed = {"tokens_per_second_per_gpu", "peak_memory_bytes"}
    expected = in_metrics(run)
    assert max(step for _, step, _ in expected) == 10
    assert in_wandb(run)[0] == expected and in_tensorboard(run)[0] == rounded(expected)
    sent, found = in_mlflow(run, monkeypatch)
    untimed = [Counter({k: n for k, n in c.items() if k[0] not in timed}) for c in (sent, expected)]
    assert untimed[0] == untimed[1], "what was repeated was not sent again"
    assert all(sent[key] >= n for key, n in first.items()), "what MLflow had first, it still has"
    assert Counter((name, step) for name, step, _ in sent) == Counter((name, step) for name, step, _ in expected)
    assert found.info.status == "FINISHED"


def test_a_run_of_several_processes(overrides, monkeypatch):
    """Worker 0 logs, and has closed its trackers when the run has results: these are added."""
    config = cruijff_kit.compose(overrides("a", "gpus=2", "batch_size=4"))
    result = cruijff_kit.train_then_eval(config)
    run = Path(config.output_dir)
    sent = in_mlflow(run, monkeypatch)[0]
    results = Counter({key: n for key, n in sent.items() if key[0].startswith(("eval/", "base_model/"))})
    assert ("eval/capitalization/match/accuracy", 5, result.metrics()["match/accuracy"]) in results
    assert sent - results == in_metrics(run) and in_tensorboard(run)[0] == rounded(sent)
    first, second = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert first.name == second.name, "two files of one run"


def test_what_was_uploaded_is_kept(recipe):
    """`wandb sync` marks what it has sent; a resumed run then begins a second file of that run, with the rest."""
    options = ["checkpoint_every_n_steps=2"]
    begun = recipe("a", *options)
    stop_at(begun, 3, MemoryError("as if killed"))
    run = begun.folder.path
    in_wandb(run)
    (first,) = run.glob("wandb/offline-run-*/*.wandb")
    first.with_name(f"{first.name}.synced").touch()
    last = recipe("a", *options, "resume_from_checkpoint=true")
    assert last.global_step == 2
    finish(last)
    assert first.exists()
    first.parent.rename(run / "first")
    assert {step for _, step, _ in in_wandb(run)[0]} == {4, 5}


def test_a_tracker_that_fails_says_so_once_and_the_run_goes_on(recipe, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("CRUIJFF_QUIET", raising=False)
    failing = recipe("a")
    ids = json.loads((failing.folder.path / "trackers.json").read_text())
    train_step = failing.train_step

    def counted(*args):
        if failing.global_step == 2:
            (kept,) = (tmp_path / "capitalization" / "mlruns").glob(f"*/{ids['mlflow']}")
            shutil.rmtree(kept)
        train_step(*args)

    failing.train_step = counted
    finish(failing)
    said = [line for line in capsys.readouterr().err.splitlines() if "mlflow failed" in line]
    assert len(said) == 1 and "metrics.jsonl is complete" in said[0]
    run, expected = failing.folder.path, in_metrics(failing.folder.path)
    assert in_wandb(run)[0] == expected and in_tensorboard(run)[0] == rounded(expected)
    monkeypatch.undo()
    after = recipe("next")
    finish(after)
    assert_all_hold(after.folder.path, monkeypatch)


def test_a_tracker_that_cannot_be_opened_does_not_end_the_run(recipe, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nosuchscheme://there")
    done = recipe("a")
    finish(done)
    assert capsys.readouterr().err.count("mlflow failed") == 1
    assert in_wandb(done.folder.path)[0] == in_metrics(done.folder.path)
    assert os.environ["MLFLOW_TRACKING_URI"] == "nosuchscheme://there"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
def test_a_missing_package_is_refused_before_anything_is_made(set_up_recipe, overrides, monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"trackers={name} .*: pip install 'cruijff_kit\[{name}\]'$"):
        set_up_recipe(*overrides("a", f"trackers=[{name}]"))
    assert not (tmp_path / "capitalization").exists()


def test_a_folder_of_that_name_is_no_package(set_up_recipe, overrides, monkeypatch, tmp_path):
    """W&B leaves a folder `wandb` where it is used."""
    (tmp_path / "there" / "wandb").mkdir(parents=True)
    monkeypatch.setattr(sys, "path", [str(tmp_path / "there")])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(UserError, match="pip install"):
        check_trackers(["wandb"])


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trackers=[wandbee]", "trackers=wandbee does not exist; valid: tensorboard, wandb, mlflow"),
        ("trackers=wandb", "trackers"),
        ("+torchtune.trackers.project=x", "unknown key torchtune.trackers.project"),
        ("torchtune.trackers.names=[wandb]", r"set trackers=\[\"wandb\"\] instead"),
    ],
)
def test_what_cannot_be_meant_is_refused(set_up_recipe, overrides, override, says):
    with pytest.raises(UserError, match=says) as refused:
        set_up_recipe(*overrides("a", "trackers=[]", override))
    assert "\n" not in str(refused.value)


def test_trackers_do_not_make_another_run(overrides):
    with_all, without = (cruijff_kit.compose(overrides("a", *more)) for more in ((), ("trackers=[]",)))
    assert config_hash(with_all) == config_hash(without)


@pytest.fixture
def proxy(monkeypatch):
    """Stands where every request to another machine would come by; counts them."""
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen():
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                asked.append(connection.recv(200))
                connection.close()

        threading.Thread(target=listen, daemon=True).start()
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{server.getsockname()[1]}")
        yield asked


def test_a_sweep_asks_no_network_and_the_default_needs_no_package(run_cli, tiny, tmp_path, proxy, monkeypatch):
    """Neither a tracker's nor, where nothing is evaluated, inspect-ai, whose import takes more than a second."""
    own = {k: v for k, v in os.environ.items() if k.startswith("WANDB_") or k.lower().endswith("_proxy")}
    options = [*SMALL, f"model.path={tiny}", "eval=none", "hydra.sweep.dir=capitalization/now"]
    done = run_cli("-m", *options, ALL, "seed=1,2", cwd=tmp_path, **own)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr and "wandb" not in done.stdout
    for name in ("seed=1", "seed=2"):
        assert_all_hold(tmp_path / "capitalization" / "now" / name, monkeypatch)
    assert proxy == []
    code = "import sys\nfor name in ('wandb', 'mlflow', 'tensorboard', 'inspect_ai'): sys.modules[name] = None\n"
    code += "from cruijff_kit.train import main\nsys.exit(main())"
    command = [sys.executable, "-c", code, *options[:-1], "hydra.run.dir=plain", "seed=3"]
    plain = subprocess.run(command, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True)
    assert plain.returncode == 0, plain.stderr
    assert (tmp_path / "plain" / "metrics.jsonl").exists() and not (tmp_path / "plain" / "trackers.json").exists()
