"""The base model's hash: every byte counts, a file is read once, and what the cache says is not believed blindly."""

import hashlib
import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from cruijff_kit.models import fingerprint as module
from cruijff_kit.models.fingerprint import fingerprint, hash_files


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, and a process that knows nothing yet."""
    monkeypatch.setenv("CRUIJFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_cache", {})
    return tmp_path / "cache"


@pytest.fixture
def model(tiny, tmp_path) -> Path:
    """A copy of the tiny model."""
    return Path(shutil.copytree(tiny, tmp_path / "model"))


@pytest.fixture
def settled(monkeypatch):
    """Files that were just written count as old ones."""
    monkeypatch.setattr(module, "_MIN_AGE_NS", -(10**18))


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """The names of the files that are read."""
    names, real = [], module._sha256
    monkeypatch.setattr(module, "_sha256", lambda file, *more: names.append(file.name) or real(file, *more))
    return names


def test_each_matrix_counts(model):
    """One value of each matrix changed, one after the other."""
    file, seen = model / "model.safetensors", {fingerprint(model)}
    weights = load_file(file)
    for number, tensor in enumerate(weights.values(), 2):
        tensor.view(-1)[tensor.numel() // 2] += 1
        save_file(weights, file, {"format": "pt"})
        seen.add(fingerprint(model))
        assert len(seen) == number
    assert len(seen) > 10


def test_every_byte_of_a_large_file_counts(tmp_path):
    folder = tmp_path / "large"
    folder.mkdir()
    file = folder / "model.safetensors"
    file.write_bytes(os.urandom(40 << 20))
    places = [0, (40 << 20) - 1, *range(99_991, 40 << 20, 7_499_977)]
    seen = {fingerprint(folder)}
    for place in places:
        with file.open("r+b") as opened:
            opened.seek(place)
            byte = opened.read(1)[0]
            opened.seek(place)
            opened.write(bytes([byte ^ 1]))
        seen.add(fingerprint(folder))
    assert len(seen) == 1 + len(places)


def test_which_files_count(model):
    before = fingerprint(model)
    for name in ("README.md", "trainer_state.json", "training_args.bin", "optimizer.pt"):
        (model / name).write_text("x")
    assert fingerprint(model) == before
    seen = {before}
    names = [
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
    ]
    for name in (*names, "chat_template.jinja", "model-00002.safetensors", "model.safetensors.index.json"):
        with (model / name).open("a") as opened:
            opened.write(" ")
        seen.add(fingerprint(model))
    assert len(seen) == 10
    (model / "config.json").rename(model / "generation_config.json")
    assert fingerprint(model) not in seen, "names count, too"


def test_hashes_are_those_that_others_show(model):
    found = hash_files(model)
    assert found["model.safetensors"] == hashlib.sha256((model / "model.safetensors").read_bytes()).hexdigest()
    assert [*found] == sorted(found) and hash_files(str(model)) == found


def test_a_file_is_read_once(model, read, own_cache, settled, monkeypatch):
    first = fingerprint(model)
    assert set(read) == {p.name for p in model.iterdir()}
    read.clear()
    assert fingerprint(model) == first and not read
    monkeypatch.setattr(module, "_cache", {})  # another process
    assert fingerprint(model) == first and not read
    link = model.parent / "link"
    link.symlink_to(model)
    assert fingerprint(link) == first and not read
    with (model / "config.json").open("a") as opened:
        opened.write(" ")
    assert fingerprint(model) != first and read == ["config.json"], "only what has changed"


def test_an_edit_with_the_old_time_is_noticed(model, settled):
    file = model / "model.safetensors"
    before, stat = fingerprint(model), file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (file.stat().st_mtime_ns, file.stat().st_size) == (stat.st_mtime_ns, stat.st_size)
    assert fingerprint(model) != before
    replaced = file.with_name("new")
    content[-1] ^= 1
    replaced.write_bytes(content)
    os.utime(replaced, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    replaced.rename(file)
    assert fingerprint(model) == before


def test_what_changed_just_now_is_read_again(model, read):
    """An edit within the tick of a file system's clock would not show in the times."""
    fingerprint(model)
    read.clear()
    fingerprint(model)
    assert "model.safetensors" in read


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"files": 3}', '{"files": {"model.safetensors": {"sha256": "0"}}}']
)
def test_a_broken_cache_costs_time_only(model, own_cache, settled, content, monkeypatch):
    right = fingerprint(model)
    (file,) = (own_cache / "fingerprints").glob("*.json")
    file.write_text(content)
    monkeypatch.setattr(module, "_cache", {})
    assert fingerprint(model) == right
    assert json.loads(file.read_text())["files"]["config.json"]["sha256"], "and it is mended"


def test_a_cache_that_cannot_be_written(model, own_cache, settled, read, monkeypatch):
    right = fingerprint(model)
    shutil.rmtree(own_cache)
    own_cache.write_text("a file where the folder would be")
    monkeypatch.setattr(module, "_cache", {})
    read.clear()
    assert fingerprint(model) == right and "model.safetensors" in read
    read.clear()
    assert fingerprint(model) == right and not read, "the process remembers"


def _in_another_process(folder: str, found) -> None:
    found.put(fingerprint(folder))


def test_processes_that_ask_at_once(model, own_cache, settled):
    """All get the same, and what they leave in the cache is whole."""
    spawn = multiprocessing.get_context("fork")
    found = spawn.Queue()
    processes = [spawn.Process(target=_in_another_process, args=(str(model), found)) for _ in range(6)]
    for process in processes:
        process.start()
    answers = [found.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert len(set(answers)) == 1
    (file,) = (own_cache / "fingerprints").glob("*.json")
    assert set(json.loads(file.read_text())["files"]) == {p.name for p in model.iterdir()}


def test_long_ones_show_how_far_they_are(model, monkeypatch):
    shown = []

    class Bar:
        def advance(self, note="", steps=1):
            shown.append(steps)

    class Progress:
        def __init__(self, what, total):
            shown.append(what)

        def __enter__(self):
            return Bar()

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(module, "progress", Progress)
    fingerprint(model)
    assert not shown
    monkeypatch.setattr(module, "_PROGRESS_BYTES", 1)
    monkeypatch.setattr(module, "_cache", {})
    (model / "model.safetensors").touch()
    fingerprint(model)
    assert shown[0] == "hashing the base model, MB" and len(shown) > 1


def test_a_base_model_is_asked_again_when_its_weights_change(model, tmp_path, settled):
    """Also if their file has the same size and time: what the cache holds is another model's."""
    import cruijff_kit

    def run(name: str):
        where = ["model=hf_llama", f"model.path={model}", f"output_dir={tmp_path / name}", "device=cpu", "dtype=fp32"]
        small = ["eval.limit=2", "eval.max_tokens=6", "max_steps_per_epoch=1", "num_warmup_steps=0", "lora.rank=2"]
        return cruijff_kit.train_then_eval(cruijff_kit.compose([*where, *small]))

    first, again = run("one"), run("two")
    assert not first.baseline[0].cached and again.baseline[0].cached and first.model_hash == again.model_hash
    file = model / "model.safetensors"
    stat, content = file.stat(), bytearray(file.read_bytes())
    content[-1] ^= 1
    with file.open("r+b") as opened:
        opened.write(content)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other = run("three")
    assert not other.baseline[0].cached and other.model_hash != first.model_hash
