"""`cruijff-kit compare`: fine-tuned or not, and how far."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cruijff_kit import compose, train_then_eval
from cruijff_kit.commands.compare import main

SMALL = ["dataset.max_samples=16", "num_warmup_steps=1", "lr=1e-2", "device=cpu", "dtype=fp32", "lora.rank=4"]


@pytest.fixture(scope="module")
def runs(tiny, tmp_path_factory) -> Path:
    """A run, `trained`; the same adapter with every B zero as PEFT would save it, `nothing`."""
    folder = tmp_path_factory.mktemp("runs")
    train_then_eval(
        compose(
            [
                "model=hf_llama",
                f"model.path={tiny}",
                *SMALL,
                "epochs=2",
                "eval=none",
                f"output_dir={folder / 'trained'}",
            ]
        )
    )
    shutil.copytree(folder / "trained" / "epoch_1", folder / "nothing")
    file = folder / "nothing" / "adapter_model.safetensors"
    save_file({k: v * (".lora_A." in k) for k, v in load_file(file).items()}, file)
    return folder


@pytest.fixture
def compare(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def call(*arguments: object) -> tuple[int, dict, str]:
        code = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        return code, json.loads(out), err

    return call


def test_a_run_against_its_base_is_what_transformers_and_peft_say(runs, compare, tiny):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    texts = ["Some text to read.", "Another"]
    code, report, _ = compare(runs / "trained", "--text", texts[0], "--text", texts[1])
    assert code == 0 and report["fine_tuned"] and report["verdict"].startswith("fine-tuned: perplexity ")
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    rows = [torch.tensor([AutoTokenizer.from_pretrained(tiny)(t)["input_ids"]]) for t in texts]
    with torch.inference_mode():
        base_logits = [base(r).logits[0] for r in rows]
        model = PeftModel.from_pretrained(base, runs / "trained" / "epoch_1").eval()
        adapter_logits = [model(r).logits[0] for r in rows]
    for name, logits in (("first", base_logits), ("second", adapter_logits)):
        losses = [
            torch.nn.functional.cross_entropy(x[:-1], r[0, 1:], reduction="sum")
            for x, r in zip(logits, rows, strict=True)
        ]
        nll = torch.stack(losses).sum() / sum(r.shape[1] - 1 for r in rows)
        assert report[name]["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-3)
    last = [(a[-1], b[-1]) for a, b in zip(base_logits, adapter_logits, strict=True)]
    distances = torch.stack([(b - a).abs() for a, b in last])
    assert report["logits"]["mean_abs"] == pytest.approx(distances.mean().item(), rel=1e-3)
    assert report["logits"]["max_abs"] == pytest.approx(distances.max().item(), rel=1e-3)
    kl = [(b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum() for a, b in last]
    assert report["kl"] == pytest.approx(torch.stack(kl).mean().item(), rel=1e-3)
    assert report["top1_agreement"] == sum((a.argmax() == b.argmax()).item() for a, b in last) / 2


def test_the_norm_is_that_of_the_updates_themselves(runs, compare):
    weights = load_file(runs / "trained" / "epoch_1" / "adapter_model.safetensors")
    scale = json.loads((runs / "trained" / "epoch_1" / "adapter_config.json").read_text())
    updates = [
        weights[k.replace("lora_A", "lora_B")] @ a * scale["lora_alpha"] / scale["r"]
        for k, a in weights.items()
        if "lora_A" in k
    ]
    update = compare(runs / "trained", "--text", "abc")[1]["second"]["update"]
    assert update["norm"] == pytest.approx(torch.stack([u.norm() for u in updates]).norm().item(), rel=1e-4)
    assert update["modules"] == update["nonzero"] == len(updates)


def test_an_adapter_that_changes_nothing(runs, compare):
    code, report, _ = compare(runs / "nothing", "--max-samples", 4)
    assert (
        code == 0 and report["fine_tuned"] is False and report["verdict"].startswith("not: the adapter changes nothing")
    )
    assert report["second"]["update"]["norm"] == 0 and report["top1_agreement"] == 1 and report["kl"] == 0


def test_answers_of_the_test_split_become_likelier(runs, compare):
    _, report, err = compare(runs / "trained")
    assert report["texts"] == 100 and report["first"]["perplexity"] > 2 * report["second"]["perplexity"] > 2
    assert "Capitalize" not in json.dumps(report) + err, "no sample is shown"


def test_two_adapters_and_a_base_model(runs, compare, tiny):
    run, last_epoch = runs / "trained", runs / "trained" / "epoch_1"
    assert compare(run, last_epoch, "--text", "abc")[1]["verdict"].startswith("the same: ")
    _, report, _ = compare(run, runs / "nothing", "--text", "abc")
    assert report["verdict"].startswith("different: ") and report["fine_tuned"] is None
    _, with_base, _ = compare(run, tiny, "--text", "abc")
    assert with_base["fine_tuned"] and with_base["first"]["adapter"] is None


def test_refused(runs, compare, tiny, tmp_path):
    assert "is a base model without an adapter" in compare(tiny)[1]["error"]["message"]
    shutil.copytree(tiny, tmp_path / "other")
    weights = load_file(tiny / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    code, answer, _ = compare(runs / "trained", tmp_path / "other")
    assert code == 2 and "the base models differ" in answer["error"]["message"]
    assert "2 folders can be named" in compare(tiny, tiny, tiny)[1]["error"]["message"]
