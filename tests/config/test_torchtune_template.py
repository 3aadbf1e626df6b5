"""Our torchtune configs and torchtune's own say the same, but for the differences named here with their reasons.

conf/torchtune.yaml, filled for each model we ship, is compared key by key with the LoRA config that the installed
torchtune ships for that model.
"""

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

import cruijff_kit
from cruijff_kit.config.run import LR_SCHEDULERS
from cruijff_kit.models.download import download_command

# Model of ours -> torchtune's config. Base models are compared with the config of their Instruct sibling where torchtune
# has no other: the two have one shape.
SHIPPED = {
    "llama3_2_1b": "llama3_2/1B_lora_single_device",
    "llama3_2_1b_instruct": "llama3_2/1B_lora_single_device",
    "llama3_2_3b": "llama3_2/3B_lora_single_device",
    "llama3_2_3b_instruct": "llama3_2/3B_lora_single_device",
    "llama3_1_8b": "llama3_1/8B_lora_single_device",
    "llama3_1_8b_instruct": "llama3_1/8B_lora_single_device",
    "mistral_7b": "mistral/7B_lora_single_device",
    "mistral_7b_instruct": "mistral/7B_lora_single_device",
    "qwen2_5_0_5b": "qwen2_5/0.5B_lora_single_device",
    "qwen2_5_0_5b_instruct": "qwen2_5/0.5B_lora_single_device",
    "qwen2_5_1_5b": "qwen2_5/1.5B_lora_single_device",
    "qwen2_5_1_5b_instruct": "qwen2_5/1.5B_lora_single_device",
    "qwen2_5_3b": "qwen2_5/3B_lora_single_device",
    "qwen2_5_3b_instruct": "qwen2_5/3B_lora_single_device",
    "qwen2_5_7b": "qwen2_5/7B_lora_single_device",
    "qwen2_5_7b_instruct": "qwen2_5/7B_lora_single_device",
}
NOT_IN_TORCHTUNE = {
    "smollm2_135m": "torchtune knows no SmolLM2; it is a plain Llama, compared with transformers in tests/models",
    "smollm2_360m": "as smollm2_135m",
    "smollm2_1_7b": "as smollm2_135m",
    "llama3_3_70b_instruct": "torchtune ships no config for one device; its shape is held against the builder below",
    "hf_llama": "any Llama folder: its shape comes from config.json",
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA3 = {
    "model_type": "llama", "vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "rope_scaling": LLAMA3_ROPE, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3_1 = LLAMA3 | {"rope_scaling": LLAMA3_ROPE | {"factor": 8.0}, "tie_word_embeddings": False}
MISTRAL = {
    "model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768, "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5, "num_key_value_heads": 8, "sliding_window": 4096, "tie_word_embeddings": False,
}  # fmt: skip
QWEN = {
    "model_type": "qwen2", "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
    "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 32768, "max_window_layers": 21,
    "tie_word_embeddings": True,
}  # fmt: skip
SMOL = {
    "model_type": "llama", "vocab_size": 49152, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
    "rope_scaling": None, "tie_word_embeddings": True,
}  # fmt: skip


def shape(family: dict[str, Any], dim: int, mlp: int, layers: int, heads: int, groups: int = 8, **more) -> dict:
    """A config.json."""
    sizes = {"hidden_size": dim, "intermediate_size": mlp, "num_hidden_layers": layers, "num_attention_heads": heads}
    return family | sizes | {"num_key_value_heads": groups} | more


# Model, up to its kind -> what its config.json says on the hub, torchtune's builder of it, and its parameters there.
PUBLISHED = {
    "llama3_2_1b": (shape(LLAMA3, 2048, 8192, 16, 32), "llama3_2.lora_llama3_2_1b", 1_235_814_400),
    "llama3_2_3b": (shape(LLAMA3, 3072, 8192, 28, 24), "llama3_2.lora_llama3_2_3b", 3_212_749_824),
    "llama3_1_8b": (shape(LLAMA3_1, 4096, 14336, 32, 32), "llama3_1.lora_llama3_1_8b", 8_030_261_248),
    "llama3_3_70b": (shape(LLAMA3_1, 8192, 28672, 80, 64), "llama3_1.lora_llama3_1_70b", 70_553_706_496),
    "mistral_7b": (shape(MISTRAL, 4096, 14336, 32, 32), "mistral.lora_mistral_7b", 7_241_732_096),
    "qwen2_5_0_5b": (shape(QWEN, 896, 4864, 24, 14, 2), "qwen2_5.lora_qwen2_5_0_5b", 494_032_768),
    "qwen2_5_1_5b": (shape(QWEN, 1536, 8960, 28, 12, 2), "qwen2_5.lora_qwen2_5_1_5b_instruct", 1_543_714_304),
    "qwen2_5_3b": (shape(QWEN, 2048, 11008, 36, 16, 2), "qwen2_5.lora_qwen2_5_3b", 3_085_938_688),
    "qwen2_5_7b": (
        shape(QWEN, 3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False),
        "qwen2_5.lora_qwen2_5_7b_instruct", 7_615_616_512,
    ),
    "smollm2_360m": (shape(SMOL, 960, 2560, 32, 15, 5, rope_theta=100000), None, 361_821_120),
    "smollm2_1_7b": (shape(SMOL, 2048, 8192, 24, 32, 32, rope_theta=130000), None, 1_711_376_384),
}  # fmt: skip


FOLDERS = "where things lie is the user's affair"
OUR_BUILDER = "one for all shapes, which reads config.json; held against torchtune's builders below"
OUR_CHECKPOINTER = "also reads biases, and no more than one weight at a time"
OUR_TOKENIZER = "renders the model's own chat template, for training and evaluation alike"
OUR_DATA = "the user's rows and prompt, where torchtune's example trains on Alpaca"
OUR_LOSS = "the same cross-entropy, with the output projection on labelled positions only"
OUR_METRICS = "metrics.jsonl in the run's folder, where torchtune writes text logs"
VALIDATION = "validation over the whole split; torchtune's recipe has none"
DEFAULTS = "a default chosen for small data on small machines; the user's to change"
DEFAULT = "the builder's default, in both"
ADDED = "a feature of our recipe"
# Key, or the first part of keys -> why it may differ. Anything else that differs fails.
DIFFERENCES = {
    "output_dir": FOLDERS,
    "checkpointer.checkpoint_dir": FOLDERS,
    "checkpointer.output_dir": FOLDERS,
    "profiler.output_dir": FOLDERS,
    "model._component_": OUR_BUILDER,
    "model.checkpoint_dir": OUR_BUILDER,
    "model.use_dora": DEFAULT,
    "model.quantize_base": DEFAULT,
    "checkpointer._component_": OUR_CHECKPOINTER,
    "tokenizer._component_": OUR_TOKENIZER,
    "tokenizer.path": OUR_TOKENIZER,
    "tokenizer.kind": OUR_TOKENIZER,
    "tokenizer.date": OUR_TOKENIZER,
    "tokenizer.max_seq_len": DEFAULTS,
    "dataset": OUR_DATA,
    "dataset_val": VALIDATION,
    "run_val_every_n_steps": VALIDATION,
    "loss": OUR_LOSS,
    "metric_logger": OUR_METRICS,
    "trackers": "torchtune's other loggers, beside metrics.jsonl; torchtune takes one",
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
OUR_RANK = {
    "model.lora_rank": "less in torchtune's example; ours is 64, as in its other configs",
    "model.lora_alpha": "2 x rank",
}
CHECKPOINTING = {"enable_activation_checkpointing": DEFAULTS}
OUTPUT = {"model.apply_lora_to_output": DEFAULT}
MERGES = {"tokenizer.merges_file": OUR_TOKENIZER}
WEIGHT_DECAY = {"optimizer.weight_decay": "0.01 in both: torch's default, which our config states"}
WARMUP = {"profiler.warmup_steps": "3, as in torchtune's Llama configs; the profiler is off"}
MEMORY = {"log_peak_memory_stats": "as in torchtune's Llama configs"}
# The same for one config of torchtune's.
DIFFERENCES_OF = {
    "llama3_2/1B_lora_single_device": OUTPUT,
    "llama3_2/3B_lora_single_device": OUTPUT | CHECKPOINTING,
    "llama3_1/8B_lora_single_device": CHECKPOINTING | OUR_RANK,
    "mistral/7B_lora_single_device": CHECKPOINTING | WEIGHT_DECAY | WARMUP | {
        "model.apply_lora_to_output": "not by default: as for the other models",
        "model.lora_alpha": "2 x rank",
        "checkpointer.checkpoint_files": "safetensors, where torchtune's example reads pickles",
    },
    "qwen2_5/0.5B_lora_single_device": OUTPUT | OUR_RANK | MERGES,
    "qwen2_5/1.5B_lora_single_device": OUTPUT | OUR_RANK | MERGES | WEIGHT_DECAY,
    "qwen2_5/3B_lora_single_device": OUTPUT | OUR_RANK | MERGES | CHECKPOINTING | WARMUP | MEMORY,
    "qwen2_5/7B_lora_single_device": CHECKPOINTING | OUR_RANK | MERGES | WARMUP | MEMORY,
}  # fmt: skip


def torchtunes(config: str) -> dict[str, Any]:
    """The config that the installed torchtune ships, filled."""
    package = Path(importlib.util.find_spec("torchtune").origin).parent
    return OmegaConf.to_container(
        OmegaConf.load(package.parent / "recipes" / "configs" / f"{config}.yaml"), resolve=True
    )


def published(model: str) -> tuple[dict[str, Any], str | None, int]:
    """What is known of a model, of either kind."""
    return PUBLISHED[model.removesuffix("_instruct")]


@pytest.fixture
def ours(tmp_path, monkeypatch):
    """Our config for a model, whose folder holds its config.json and (empty) weight files of torchtune's names."""
    monkeypatch.setenv("CRUIJFF_MODELS", str(tmp_path))

    def compose(model: str) -> dict[str, Any]:
        folder = Path(cruijff_kit.compose([f"model={model}"]).model.path)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(published(model)[0]))
        for name in torchtunes(SHIPPED[model])["checkpointer"]["checkpoint_files"] if model in SHIPPED else ():
            (folder / name).touch()
        return cruijff_kit.compose([f"model={model}"]).torchtune

    return compose


ROTATION = ("dim", "base", "scale_factor", "low_freq_factor", "high_freq_factor", "old_context_len")


def shapes(model) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight."""
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


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
     ("checkpointer.model_type", "LLAMA3"), ("profiler.enabled", True), ("new_key", 1),
     ("model.lora_attn_modules", ["q_proj"])],
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


def test_each_model_says_what_it_is_and_how_to_get_it(request):
    """The comment's command is the one that a missing folder is answered with, from where the command is started."""
    folder = request.config.rootpath / "conf" / "model"
    models = {f.stem for f in folder.glob("*.yaml")} - {"hf_llama", "smollm2_135m"}
    assert len(models) == 19
    for model in models:
        text = (folder / f"{model}.yaml").read_text()
        config = cruijff_kit.compose([f"model={model}"]).model
        command = download_command(dataclasses.replace(config, path=f"models/{config.name}"))
        assert f"#   {command}\n" in text and "models_dir=DIR, export CRUIJFF_MODELS=DIR, or model.path=DIR" in text
        assert Path(config.path).name == config.name == config.hub.rpartition("/")[2]
        assert config.kind == ("chat" if "Instruct" in config.name else "base")
        assert config.kind == ("chat" if model.endswith("instruct") or "smol" in model else "base")
        assert config.resources.cpus and config.resources.mem and config.resources.time
        assert (config.resources.gpus is None) == (model == "smollm2_360m")


def test_where_models_are_expected(tmp_path, monkeypatch):
    def path(*overrides: str) -> str:
        return cruijff_kit.compose(["model=qwen2_5_3b", *overrides]).model.path

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CRUIJFF_MODELS", raising=False)
    assert path() == f"{tmp_path}/models/Qwen2.5-3B"
    monkeypatch.setenv("CRUIJFF_MODELS", "/shared")
    assert path() == "/shared/Qwen2.5-3B"
    assert path("models_dir='~/here'") == f"{Path.home()}/here/Qwen2.5-3B"
    assert path("models_dir=/other", "model.path=/mine") == "/mine"


@pytest.mark.parametrize("model", PUBLISHED)
def test_our_builder_makes_the_published_model(ours, model):
    """Built without memory for weights, with our arguments: as many parameters as the published model has, and each with
    the name and shape that torchtune's own builder gives it, and the same rotation."""
    import torch

    from cruijff_kit.models.base_model import build_on_meta
    from cruijff_kit.models.compat import get_adapter_params, get_component
    from cruijff_kit.training.component_checks import check_components

    settings, builder, parameters = published(model)
    config = ours("llama3_3_70b_instruct" if model == "llama3_3_70b" else model)
    check_components(config)
    built = build_on_meta(config["model"], torch.bfloat16)
    adapters = sum(p.numel() for p in get_adapter_params(built).values())
    assert sum(p.numel() for p in built.parameters()) - adapters == parameters
    assert built.max_seq_len == settings.get("sliding_window" if "mistral" in model else "", built.max_seq_len)
    if builder is None:
        return
    arguments = {k: v for k, v in config["model"].items() if k not in ("_component_", "checkpoint_dir")}
    with torch.device("meta"):
        theirs = get_component(f"torchtune.models.{builder}")(**arguments)
    assert shapes(built) == shapes(theirs)
    rotations = [{k: getattr(m.layers[0].attn.pos_embeddings, k, None) for k in ROTATION} for m in (built, theirs)]
    if rotations[1]["scale_factor"] is None:  # torchtune's unscaled rotations have no such arguments
        rotations = [{k: r[k] for k in ("dim", "base")} for r in rotations]
    assert rotations[0] == rotations[1]
    assert built.norm.eps == theirs.norm.eps and type(built.output) is type(theirs.output)
    assert built.max_seq_len == theirs.max_seq_len or "mistral" in model  # ours ends where its sliding window begins


def test_a_dry_run_of_a_large_model_needs_no_weights(tiny, tmp_path, monkeypatch, capsys):
    """Its folder holds a tokenizer and an empty file where the weights belong."""
    from cruijff_kit.train import main

    folder = tmp_path / "models" / "Llama-3.1-8B-Instruct"
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder)
    (folder / "config.json").write_text(json.dumps(published("llama3_1_8b")[0]))
    (folder / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["train.py", "model=llama3_1_8b_instruct", "dry_run=true", "lora.rank=8", "dtype=bf16"]
    )
    assert main() == 0
    out = capsys.readouterr().out
    # rank x (in + out) of q, v and o projections and the MLP's three, in 32 layers; fp32 on disk
    adapters = 32 * 8 * ((4096 + 4096) + (4096 + 1024) + (4096 + 4096) + 3 * (4096 + 14336))
    assert f" {adapters} (0.24%) " in out and f" {4 * adapters / 1e6:.1f} MB " in out, out[:2000]


def test_the_schedulers_exist():
    from cruijff_kit.models.compat import get_component

    assert all(callable(get_component(name)) for name in LR_SCHEDULERS.values())
