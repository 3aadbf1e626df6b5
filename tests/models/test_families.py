"""Every family against transformers: logits, training of the adapter alone, the adapter in peft, the merged model."""

import functools
import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cruijff_kit
from cruijff_kit.data.generators import generate
from cruijff_kit.models.adapter import adapter_state
from cruijff_kit.models.base_model import build, build_on_meta, read_base
from cruijff_kit.models.device import Machine
from cruijff_kit.models.hf_config import read_architecture
from cruijff_kit.models.merge import merge
from cruijff_kit.recipes.lora_multi import MultiLoraTrainer, Slot
from cruijff_kit.runs.plan import plan_run
from cruijff_kit.util.errors import UserError

CPU = Machine(torch.device("cpu"), torch.float32, 1)
LLAMA3_ROPE = {  # both ends and the middle of its three ranges are in use
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 3.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}
MODELS = {
    "llama untied": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama3 rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "linear rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "head_dim": ("llama", {"head_dim": 20, "num_key_value_heads": 1}),
    "shards": ("llama", {"shard": "40KB", "rms_norm_eps": 1e-3}),
    "bf16 file": ("llama", {"dtype": torch.bfloat16}),
    "mistral": ("mistral", {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "mistral head_dim, window, shards": (
        "mistral", {"head_dim": 8, "num_attention_heads": 10, "sliding_window": 100, "shard": "40KB"},
    ),
    "mistral tied": ("mistral", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
    "qwen2.5 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2.5 untied": ("qwen2", {"shard": "40KB"}),
    "qwen2.5 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 1}),
}  # fmt: skip


def load(folder: Path, **lora):
    """Our model of a folder, with fresh adapters, which change nothing yet."""
    config = cruijff_kit.compose(["model=hf_llama", f"model.path={folder}"]).torchtune
    model = {**config["model"], **lora}
    return build(model, read_base(config["checkpointer"], CPU), CPU).eval()


def some_ids(length: int, rows: int = 2) -> torch.Tensor:
    return torch.randint(3, 259, (rows, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_those_of_transformers(save_model, reference_logits, name):
    family, keys = MODELS[name]
    folder = save_model(family, **keys)
    model = load(folder)
    assert model.max_seq_len == (100 if "window" in name else 256)
    assert ("shard" in keys) == (len(list(folder.glob("*.safetensors"))) > 1)
    ids = some_ids(model.max_seq_len)
    with torch.inference_mode():
        ours, theirs = model(ids), reference_logits(folder, ids)
    assert theirs.std() > 0.3, "logits that are all alike would prove nothing"
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-4)


LORA = {
    "llama untied": ["lora.attn_modules=[q_proj,k_proj,v_proj,output_proj]", "lora.apply_to_output=true"],
    "llama3 rope": ["lora.rank=4"],
    "biases": ["lora.attn_modules=[q_proj,k_proj,v_proj,output_proj]", "lora.use_dora=true"],
    "head_dim": ["lora.attn_modules=[k_proj]", "lora.apply_to_mlp=false", "lora.alpha=4"],
    "bf16 file": ["lora.rank=4", "lora.use_dora=true"],
    "mistral": ["lora.rank=4", "lora.attn_modules=[]", "lora.dropout=0.1"],
    "mistral head_dim, window, shards": ["lora.attn_modules=[q_proj,k_proj]", "lora.use_dora=true"],
    "qwen2.5 tied": ["lora.attn_modules=[q_proj,k_proj]", "lora.rank=4"],
    "qwen2.5 untied": [
        "lora.attn_modules=[q_proj,k_proj,v_proj,output_proj]", "lora.apply_to_output=true", "lora.use_dora=true",
    ],
}  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}


@pytest.mark.parametrize("name", LORA)
def test_training_changes_the_adapter_alone_and_others_load_it(
    set_up_recipe, save_model, reference_logits, tmp_path, name
):
    family, keys = MODELS[name]
    folder = save_model(family, **keys)
    files = digests(folder)
    small = ["dtype=fp32", "num_warmup_steps=0", "lr=2e-2", "dataset.validation_split=null", "dataset.max_samples=24"]
    where = ["model=hf_llama", f"model.path={folder}", f"output_dir={tmp_path / 'run'}", "lora.rank=8"]
    recipe = set_up_recipe(*where, *small, *LORA[name])
    trainable = {n for n, p in recipe.model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or n.endswith("magnitude") for n in trainable)
    before = {n: p.detach().clone() for n, p in recipe.model.named_parameters()}
    ids = some_ids(60, rows=1)
    with torch.inference_mode():
        recipe.model.eval()
        base_model = recipe.model(ids)
        torch.testing.assert_close(base_model, reference_logits(folder, ids), rtol=0, atol=2e-4)
    recipe.train()
    recipe.cleanup()
    changed = {n for n, p in recipe.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == trainable and digests(folder) == files
    with torch.inference_mode():
        ours = recipe.model.eval()(ids)
    assert (ours - base_model).abs().max() > 0.05, "the adapter does nothing, so the test proves nothing"
    torch.testing.assert_close(ours, logits_by_peft(recipe.folder.epoch(0), ids), rtol=0, atol=2e-4)
    merged = merge(folder, recipe.folder.epoch(0), tmp_path / "merged", shard_bytes=50_000)
    rounded = 0.1 if keys.get("dtype") else 2e-4  # merged weights are rounded to the file's precision
    torch.testing.assert_close(ours, reference_logits(merged, ids), rtol=0, atol=rounded)
    check_merged(folder, merged)


def logits_by_peft(adapter: Path, ids: torch.Tensor) -> torch.Tensor:
    """peft, offline, from the adapter folder alone: the base folder stands in its config."""
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(adapter, dtype=torch.float32).eval()
    with torch.inference_mode():
        return model(ids).logits


def check_merged(base: Path, merged: Path) -> None:
    """A plain model folder, with the base's names and precision, in shards."""
    weights = {n: t for f in merged.glob("*.safetensors") for n, t in load_file(f).items()}
    theirs = {n: t for f in base.glob("*.safetensors") for n, t in load_file(f).items()}
    assert {n: (t.shape, t.dtype) for n, t in weights.items()} == {n: (t.shape, t.dtype) for n, t in theirs.items()}
    assert len(list(merged.glob("*.safetensors"))) > 1 and not list(merged.glob("adapter*"))
    others = {f.name for f in base.iterdir() if ".safetensors" not in f.name}
    assert others == {f.name for f in merged.iterdir() if ".safetensors" not in f.name}
    assert len({f.stat().st_mode for f in merged.iterdir()}) == 1


@pytest.fixture
def changed_config(tiny, tmp_path):
    """A function: keys of config.json that differ -> a folder with that config.json, of the tiny Llama."""

    def change(**keys) -> Path:
        settings = json.loads((tiny / "config.json").read_text()) | keys
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in settings.items() if v != "absent"}))
        return tmp_path

    return change


@pytest.mark.parametrize(
    ("keys", "reason"),
    [
        ({"model_type": "gemma"}, "model_type 'gemma' (its norms scale by 1 + weight"),
        ({"model_type": "mixtral"}, "model_type 'mixtral' (a mixture of experts); supported: llama, mistral, qwen2"),
        ({"model_type": "qwen3"}, "model_type 'qwen3' (it normalises queries and keys (q_norm, k_norm)"),
        ({"model_type": "new"}, "model_type 'new'; supported: llama, mistral, qwen2"),
        ({"model_type": "absent"}, "model_type None; supported: llama, mistral, qwen2"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "rope scaling of type 'yarn'; supported: default, linear"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope scaling of type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu', not 'silu'"),
        ({"hidden_act": "gelu", "rope_scaling": {"type": "yarn"}}, "'yarn'; supported: default, linear, llama3; hidden_"),
        ({"quantization_config": {"quant_method": "gptq"}}, "its weights are quantized (gptq)"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": "absent"}, "config.json lacks hidden_size"),
        ({"rope_scaling": {"type": "llama3", "factor": 8}}, "config.json lacks rope_scaling.low_freq_factor"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_represented_is_refused_by_name(changed_config, keys, reason):
    with pytest.raises(UserError) as caught:
        read_architecture(changed_config(**keys))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_old_and_new_ways_to_write_the_rotary_settings(changed_config):
    old = {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None}
    new = {"rope_theta": "absent", "rope_scaling": "absent"}
    new |= {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}}
    assert read_architecture(changed_config(**old)) == read_architecture(changed_config(**new))


def test_broken_and_foreign_weights_are_named(save_model):
    from safetensors.torch import save_file

    folder = save_model("llama")
    file = folder / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {"model.layers.0.self_attn.q_norm.weight": torch.ones(12)}, file)
    with pytest.raises(UserError, match="q_norm.weight, which no llama has"):
        load(folder)
    save_file({n: t for n, t in weights.items() if "lm_head" not in n}, file)
    with pytest.raises(UserError, match="1 names differ, for example output.weight"):
        load(folder)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match="is not a complete safetensors file .* download it again"):
        load(folder)


def test_a_shard_that_is_missing_is_named(save_model):
    folder = save_model("llama", shard="40KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(UserError, match=f"has no {shards[1].name}"):
        plan_run(cruijff_kit.compose(["model=hf_llama", f"model.path={folder}", "eval=none"]))


def test_an_adapter_of_tied_output_weights_is_refused(tiny):
    config = cruijff_kit.compose(["model=hf_llama", f"model.path={tiny}", "lora.apply_to_output=true"]).torchtune
    with pytest.raises(UserError, match="set lora.apply_to_output=false"):
        build_on_meta(config["model"])


def test_a_builder_with_another_rotation_is_refused():
    arguments = {"lora_attn_modules": ["q_proj"], "lora_rank": 2}
    with pytest.raises(
        UserError, match="Qwen2RotaryPositionalEmbeddings, and cruijff_kit does not order weights for it"
    ):
        build_on_meta({"_component_": "torchtune.models.qwen2_5.lora_qwen2_5_0_5b", **arguments})


def test_dora_begins_at_the_base_model_and_learns_lengths(save_model):
    model = load(save_model("llama"), use_dora=True)
    adapter = model.layers[0].attn.q_proj
    torch.testing.assert_close(adapter.magnitude, torch.linalg.norm(adapter.weight, dim=1))
    assert adapter.magnitude.requires_grad and not adapter.weight.requires_grad


def test_four_bits_on_the_frozen_layers_alone(save_model, reference_logits):
    """NF4 computes on a CPU too, slowly: what differs from the plain model is the rounding."""
    from cruijff_kit.models.compat import NF4Tensor

    shape = {"hidden_size": 64, "intermediate_size": 128}
    folder = save_model("qwen2", **shape)
    config = cruijff_kit.compose(["model=hf_llama", f"model.path={folder}", "lora.quantize_base=true"]).torchtune
    weights = read_base(config["checkpointer"], CPU, quantize_base=True)
    quantized = {n for n, w in weights.items() if isinstance(w, NF4Tensor)}
    assert quantized == {n for n, w in weights.items() if n.startswith("layers.") and w.ndim == 2}
    model = build(config["model"], weights, CPU)
    ids = some_ids(40)
    loss = model(ids).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    weights = {n: w.get_original_weight() if n in quantized else w for n, w in weights.items()}
    plain = build(config["model"] | {"quantize_base": False}, weights, CPU)
    with torch.inference_mode():
        torch.testing.assert_close(model(ids), plain(ids), rtol=0, atol=2e-4)
        difference = (model(ids) - reference_logits(folder, ids)).abs().mean()
    assert 0.001 < difference < 0.5 * reference_logits(folder, ids).std()


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_run_on_four_bits_learns_answers_and_is_saved(tiny, tmp_path, use_dora):
    """The recipe itself, which the plan lets run on a GPU only."""
    from cruijff_kit.evaluation.engine import ChatModel, CompletionRequest
    from cruijff_kit.recipes.lora_single_device import LoRAFinetuneRecipeSingleDevice

    config = cruijff_kit.compose([
        "model=hf_llama", f"model.path={tiny}", f"output_dir={tmp_path}", "device=cpu", "dtype=bf16", "lora.rank=4",
        "lora.quantize_base=true", f"lora.use_dora={use_dora}", "lr=5e-3", "num_warmup_steps=0", "dataset.max_samples=64",
        "dataset.validation_split=null",
    ])  # fmt: skip
    generate(config.dataset.generator, config.dataset.arguments)
    recipe = LoRAFinetuneRecipeSingleDevice(config.torchtune)
    recipe.setup()
    recipe.train()
    recipe.cleanup()
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 8 and losses[-1] < losses[0] / 2
    chat_model = ChatModel(recipe.model, recipe.tokenizer, recipe.machine)
    assert len(chat_model.generate([CompletionRequest([5, 6, 7], 3), CompletionRequest([5, 8], 2)])) == 2
    saved = load_file(tmp_path / "epoch_0" / "adapter_model.safetensors")
    assert all(t.dtype == torch.float32 for t in saved.values())
    assert any("magnitude" in name for name in saved) == use_dora


def test_the_plan_refuses_before_anything_is_read(save_model, changed_config):
    folder = save_model("mistral", sliding_window=20)
    (folder / "model.safetensors").write_bytes(b"no weights")
    arguments = ["model=hf_llama", f"model.path={folder}", "eval=none", "device=cpu"]
    with pytest.raises(
        UserError, match="reads at most 20 .from there on its sliding window takes effect, which torchtune"
    ):
        plan_run(cruijff_kit.compose(arguments))
    arguments[1] = f"model.path={changed_config(model_type='gemma2')}"
    with pytest.raises(UserError, match="model_type 'gemma2' .its norms scale by 1"):
        plan_run(cruijff_kit.compose(arguments))


EVERYTHING = ["lora.attn_modules=[q_proj,k_proj,v_proj,output_proj]", "lora.apply_to_output=true"]
GROUPED = {
    "llama untied": [EVERYTHING, [*EVERYTHING, "lora.dropout=0.2", "lora.rank=4"], ["lora.use_dora=true", "seed=3"]],
    "biases": [["lora.rank=4"], ["lora.dropout=0.1"], ["lora.use_dora=true", "lora.dropout=0.1"]],
    "qwen2.5 untied": [EVERYTHING, ["lora.attn_modules=[k_proj]", "lora.apply_to_mlp=false"], ["batch_size=3"]],
    "mistral head_dim, window, shards": [["lora.rank=4"], ["lora.rank=16", "lr=1e-3"], ["seed=3"]],
}


@pytest.mark.parametrize("name", GROUPED)
def test_a_pack_on_every_kind_of_base(set_up_recipe, save_model, tmp_path, name):
    """Biases, output projections with adapters, heads of their own width: each adapter as the run alone makes it."""
    family, keys = MODELS[name]
    small = [
        "dtype=fp32",
        "num_warmup_steps=0",
        "lr=1e-2",
        "dataset.max_samples=24",
        "dataset.max_validation_samples=8",
    ]
    where = ["model=hf_llama", f"model.path={save_model(family, **keys)}", "lora.rank=8", "dataset.max_seq_len=100"]
    alone, members = [], []

    def train(number: int, more: list[str], slot: Slot) -> None:
        own = ["eval=none", "device=cpu", f"output_dir={tmp_path / str(number)}"]
        config = cruijff_kit.compose([*where, *small, *own, *more])
        members.append(slot.make_recipe(config.torchtune))
        members[-1].setup()
        members[-1].train()

    for number, more in enumerate(GROUPED[name]):
        alone.append(set_up_recipe(*where, *small, *more, f"output_dir={tmp_path / f'alone{number}'}"))
        alone[-1].train()
    functions = [functools.partial(train, number, more) for number, more in enumerate(GROUPED[name])]
    assert MultiLoraTrainer().run(functions) == [None] * 3
    for grouped, own in zip(members, alone, strict=True):
        assert grouped.summary.validation_losses == pytest.approx(own.summary.validation_losses, rel=1e-5)
        ours, theirs = adapter_state(grouped.model), adapter_state(own.model)
        moved = torch.cat([v.flatten() for k, v in theirs.items() if ".lora_b" in k]).norm()
        assert torch.cat([(ours[k] - theirs[k]).flatten() for k in theirs]).norm() < 0.01 * moved
