"""Our torchtune configs and torchtune's own say the same, but for the differences named here with their reasons.

conf/torchtune.yaml, filled for each model we ship, is compared key by key with the LoRA config that the installed
torchtune ships for that model.
"""

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import cruijff_kit
from cruijff_kit.config import LR_SCHEDULERS

# Model of ours -> torchtune's config. Base models are compared with the config of their Instruct sibling: torchtune has
# no other, and the two have one shape.
SHIPPED = {
    "llama3_2_1b": "llama3_2/1B_lora_single_device",
    "llama3_2_1b_instruct": "llama3_2/1B_lora_single_device",
    "llama3_2_3b_instruct": "llama3_2/3B_lora_single_device",
    "llama3_1_8b": "llama3_1/8B_lora_single_device",
    "llama3_1_8b_instruct": "llama3_1/8B_lora_single_device",
}
NOT_IN_TORCHTUNE = {
    "smollm2_135m": "torchtune knows no SmolLM2; it is a plain Llama, compared with transformers in tests/models",
    "hf_llama": "any Llama folder: its shape comes from config.json",
}
PARAMETERS = {  # of the base model, from its page on the hub
    "llama3_2_1b": 1_235_814_400,
    "llama3_2_1b_instruct": 1_235_814_400,
    "llama3_2_3b_instruct": 3_212_749_824,
    "llama3_1_8b": 8_030_261_248,
    "llama3_1_8b_instruct": 8_030_261_248,
}

FOLDERS = "where things lie is the user's affair"
OUR_TOKENIZER = "renders the model's own chat template, for training and evaluation alike"
OUR_DATA = "the user's rows and prompt, where torchtune's example trains on Alpaca"
OUR_LOSS = "the same cross-entropy, with the output projection on labelled positions only"
OUR_METRICS = "metrics.jsonl in the run's folder, where torchtune writes text logs"
VALIDATION = "validation over the whole split; torchtune's recipe has none"
DEFAULTS = "a default chosen for small data on small machines; the user's to change"
ADDED = "a feature of our recipe"
# Key, or the first part of keys -> why it may differ. Anything else that differs fails.
DIFFERENCES = {
    "output_dir": FOLDERS,
    "checkpointer.checkpoint_dir": FOLDERS,
    "checkpointer.output_dir": FOLDERS,
    "profiler.output_dir": FOLDERS,
    "tokenizer._component_": OUR_TOKENIZER,
    "tokenizer.path": OUR_TOKENIZER,
    "tokenizer.kind": OUR_TOKENIZER,
    "tokenizer.max_seq_len": DEFAULTS,
    "dataset": OUR_DATA,
    "dataset_val": VALIDATION,
    "run_val_every_n_steps": VALIDATION,
    "loss": OUR_LOSS,
    "metric_logger": OUR_METRICS,
    "save_adapter_weights_only": "merged weights are large, and equal to base and adapter; save_merged asks for them",
    "save_merged": ADDED,
    "custom_metrics": ADDED,
    "nproc_per_node": "an argument of tune run; here the config says on how many GPUs a run trains",
    "checkpoint_every_n_steps": ADDED,
    "epochs_to_save": ADDED,
    "group_by_length": ADDED,
    "threads": ADDED,
    "seed": "runs repeat: a seed of 1234, where torchtune's example draws one",
    "device": "auto: CUDA if there is one; torchtune's example asks for it",
    "dtype": "auto: bf16 where the machine computes in it; torchtune's example asks for it",
    "optimizer.lr": DEFAULTS,
    "batch_size": DEFAULTS,
    "gradient_accumulation_steps": DEFAULTS,
    "lr_scheduler.num_warmup_steps": DEFAULTS,
}
# The same for one config of torchtune's.
DIFFERENCES_OF = {
    "llama3_2/1B_lora_single_device": {},
    "llama3_2/3B_lora_single_device": {"enable_activation_checkpointing": DEFAULTS},
    "llama3_1/8B_lora_single_device": {
        "enable_activation_checkpointing": DEFAULTS,
        "model.lora_rank": "8 in torchtune's example; ours is 64, as in its other configs",
        "model.lora_alpha": "2 x rank",
        "model.apply_lora_to_output": "false, the builder's default, in both",
    },
}


def torchtunes(config: str) -> dict[str, Any]:
    """The config that the installed torchtune ships, filled."""
    package = Path(importlib.util.find_spec("torchtune").origin).parent
    return OmegaConf.to_container(
        OmegaConf.load(package.parent / "recipes" / "configs" / f"{config}.yaml"), resolve=True
    )


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """Our config for a model, whose folder holds (empty) weight files of the names that torchtune lists."""
    monkeypatch.setenv("CRUIJFF_MODELS", str(tmp_path))

    def compose(model: str) -> dict[str, Any]:
        folder = Path(cruijff_kit.compose([f"model={model}"]).model.path)
        folder.mkdir()
        for name in torchtunes(SHIPPED[model])["checkpointer"]["checkpoint_files"]:
            (folder / name).touch()
        return cruijff_kit.compose([f"model={model}"]).torchtune

    return compose


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    pairs = {}
    for key, value in tree.items():
        pairs |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return pairs


def differing(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Keys whose values differ, or that only one side has."""
    one, other, absent = flat(one), flat(other), object()
    return {key for key in one.keys() | other.keys() if one.get(key, absent) != other.get(key, absent)}


def unnamed(keys: set[str], config: str) -> set[str]:
    """Those keys that no reason is given for."""
    named = DIFFERENCES | DIFFERENCES_OF[config]
    return {key for key in keys if key not in named and key.partition(".")[0] not in named}


@pytest.mark.parametrize("model", SHIPPED)
def test_differences_from_torchtunes_own_config_are_named(ours, model):
    keys = differing(ours(model), torchtunes(SHIPPED[model]))
    assert not unnamed(keys, SHIPPED[model])
    # A reason whose difference is gone is removed.
    stale = {
        d
        for d in DIFFERENCES_OF[SHIPPED[model]] | DIFFERENCES
        if not any(k == d or k.startswith(f"{d}.") for k in keys)
    }
    assert not stale


@pytest.mark.parametrize(
    ("key", "value"),
    [("model.lora_dropout", 0.1), ("optimizer.weight_decay", 0.0), ("optimizer.betas", [0.9, 0.95]), ("epochs", 2),
     ("checkpointer.model_type", "LLAMA3"), ("profiler.enabled", True), ("new_key", 1), ("model._component_", "x")],
)  # fmt: skip
def test_a_difference_without_a_reason_is_noticed(ours, key, value):
    changed = OmegaConf.create(ours("llama3_2_1b_instruct"))
    OmegaConf.update(changed, key, value, force_add=True)
    config = SHIPPED["llama3_2_1b_instruct"]
    assert unnamed(differing(OmegaConf.to_container(changed), torchtunes(config)), config) == {key}


def test_a_key_of_torchtunes_that_we_lack_is_noticed(ours):
    config = SHIPPED["llama3_2_1b_instruct"]
    theirs = torchtunes(config) | {"new_in_torchtune": True}
    assert unnamed(differing(ours("llama3_2_1b_instruct"), theirs), config) == {"new_in_torchtune"}


def test_every_model_is_compared_or_excused(request):
    models = {p.stem for p in (request.config.rootpath / "conf" / "model").glob("*.yaml")}
    assert models == SHIPPED.keys() | NOT_IN_TORCHTUNE.keys()
    assert not SHIPPED.keys() & NOT_IN_TORCHTUNE.keys()


@pytest.mark.parametrize("model", SHIPPED)
def test_each_model_says_how_to_get_it(request, model):
    """The comment's command names the hub's model and the folder that is read."""
    text = (request.config.rootpath / "conf" / "model" / f"{model}.yaml").read_text()
    config = cruijff_kit.compose([f"model={model}"]).model
    assert f"hf download {config.hub} --local-dir models/{Path(config.path).name} --exclude 'original/*'" in text
    assert config.hub == f"meta-llama/{config.name}" and config.kind == (
        "chat" if "Instruct" in config.name else "base"
    )


@pytest.mark.parametrize("model", PARAMETERS)
def test_each_builder_makes_the_whole_model(ours, model):
    """Built without memory for weights, with our arguments: as many parameters as the published model has."""
    import torch

    from cruijff_kit.compat import get_adapter_params
    from cruijff_kit.models.base import skeleton
    from cruijff_kit.training.components import check_components

    config = ours(model)
    check_components(config)
    built = skeleton(config["model"], torch.bfloat16)
    adapters = sum(p.numel() for p in get_adapter_params(built).values())
    assert sum(p.numel() for p in built.parameters()) - adapters == PARAMETERS[model]
    assert built.max_seq_len == 131072


def test_a_dry_run_of_a_large_model_needs_no_weights(tiny, tmp_path, monkeypatch, capsys):
    """Its folder holds a tokenizer and an empty file where the weights belong."""
    from cruijff_kit.train import main

    folder = tmp_path / "models" / "Llama-3.1-8B-Instruct"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    (folder / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["train.py", "model=llama3_1_8b_instruct", "dry_run=true", "lora.rank=8", "dtype=bf16"]
    )
    with pytest.raises(SystemExit, match="0"):
        main()
    out = capsys.readouterr().out
    # rank x (in + out) of q, v and o projections and the MLP's three, in 32 layers; 2 bytes each on disk
    adapters = 32 * 8 * ((4096 + 4096) + (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 14336))
    assert f" {adapters} (0.24%) " in out and f" {2 * adapters / 1e6:.1f} MB " in out, out[:2000]


def test_the_schedulers_exist():
    from cruijff_kit.compat import get_component

    assert all(callable(get_component(name)) for name in LR_SCHEDULERS.values())
