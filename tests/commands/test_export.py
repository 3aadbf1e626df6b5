"""What a run's adapter becomes outside: a folder for peft, or a whole model for transformers; and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from cruijff_kit.commands.export import main


@pytest.fixture(scope="module")
def run(set_up_recipe, tiny, tmp_path_factory) -> Path:
    """A run of three epochs of which the first and the last were kept, its base model in a folder of its own."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny, folder / "base")
    recipe = set_up_recipe(
        "model=hf_llama", f"model.path={folder / 'base'}", f"output_dir={folder / 'run'}", "epochs=3",
        "epochs_to_save=[0,2]", "dataset.max_samples=16", "dataset.validation_split=null", "num_warmup_steps=0",
        "lr=1e-2", "lora.rank=4", "dtype=fp32",
    )  # fmt: skip
    recipe.train()
    recipe.cleanup()
    ids = torch.tensor([recipe.train_data[0].tokens])
    with torch.inference_mode():
        torch.save({"ids": ids, "logits": recipe.model.eval()(ids)}, folder / "expected.pt")
    return folder / "run"


@pytest.fixture
def export(capsys):
    """Runs the command in this process; returns exit code, stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


def test_the_last_adapter_as_a_folder_for_peft(run, export, tmp_path):
    from peft import AutoPeftModelForCausalLM

    code, out, err = export(run, "--to", tmp_path / "new" / "adapter")
    assert (code, err) == (0, "") and out == f"adapter of epoch 2 written to {tmp_path}/new/adapter\n"
    files = {f.name: f.read_bytes() for f in (tmp_path / "new" / "adapter").iterdir()}
    assert files == {f.name: f.read_bytes() for f in (run / "epoch_2").iterdir()}
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "new" / "adapter", dtype=torch.float32)
    assert_logits(run, model)


def test_merged_into_a_model_of_its_own(run, export, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    to = tmp_path / "model"
    code, out, err = export(run, "--merged", "--to", to, "--json")
    assert (code, err) == (0, "")
    base = str(run.parent / "base")
    written = json.loads(out)
    files = written.pop("files")
    assert {f["path"]: f["bytes"] for f in files} == {str(f): f.stat().st_size for f in to.iterdir()}
    assert written.pop("bytes") == sum(f["bytes"] for f in files)
    assert written == {"run": str(run), "epoch": 2, "base": base, "merged": True, "to": str(to)}
    assert {f.name for f in to.iterdir()} == {f.name for f in Path(base).iterdir()}
    assert_logits(run, AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32))
    chat = [{"role": "user", "content": "a"}]
    texts = [AutoTokenizer.from_pretrained(f).apply_chat_template(chat, tokenize=False) for f in (to, base)]
    assert texts[0] == texts[1]


def assert_logits(run: Path, model) -> None:
    expected = torch.load(run.parent / "expected.pt")
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(expected["ids"]).logits, expected["logits"], rtol=0, atol=2e-4)


def test_an_earlier_epoch(run, export, tmp_path):
    assert export(run, "--epoch", 0, "--to", tmp_path / "a")[0] == 0
    assert (tmp_path / "a" / "adapter_model.safetensors").read_bytes() == (
        run / "epoch_0" / "adapter_model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("merged", [(), ("--merged",)])
def test_what_is_refused(run, export, tmp_path, merged):
    def refused(*arguments: object) -> str:
        code, out, err = export(*arguments, *merged)
        assert code == 2 and out == "" and err.count("\n") == 1
        return err

    to = tmp_path / "to"
    message = refused(run, "--epoch", 1, "--to", to)
    assert message == f"error: {run} holds no adapter of epoch 1; there: 0, 2 (counted from 0)\n"
    assert "no such folder: /nowhere" in refused("/nowhere", "--to", to)
    assert "holds no saved adapter" in refused(tmp_path, "--to", to)
    assert f"is an adapter; give the run's folder: {run}" in refused(run / "epoch_0", "--to", to)
    (tmp_path / "sweep" / "one").mkdir(parents=True)
    (tmp_path / "sweep" / "one" / "result.json").write_text("{}")
    assert f"for example {tmp_path}/sweep/one" in refused(tmp_path / "sweep", "--to", to)
    to.mkdir()
    assert f"--to {to} exists already; choose another folder" in refused(run, "--to", to)
    assert not list(to.iterdir())


def test_a_base_model_that_is_gone_or_another(run, export, tmp_path):
    moved = shutil.copytree(run, tmp_path / "run")
    config = moved / "epoch_2" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"base_model_name_or_path": "/models/gone"}))
    code, _, err = export(moved, "--merged", "--to", tmp_path / "to")
    assert code == 2 and "was /models/gone, which is missing; restore it, or write its new place into" in err
    other = shutil.copytree(run.parent / "base", tmp_path / "other")
    (other / "model.safetensors").unlink()
    config.write_text(json.dumps(settings | {"base_model_name_or_path": str(other)}))
    code, _, err = export(moved, "--merged", "--to", tmp_path / "to")
    assert code == 2 and f"the base model {other} has no model.safetensors" in err
    from safetensors.torch import save_file

    save_file({"model.norm.weight": torch.ones(128)}, other / "model.safetensors")
    code, _, err = export(moved, "--merged", "--to", tmp_path / "to")
    assert code == 2 and "which the adapter in" in err and "it is another model" in err
    assert not [p for p in tmp_path.iterdir() if "to" in p.name]
