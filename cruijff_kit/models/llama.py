"""torchtune models for any plain Llama folder: the shape is read from its config.json."""

import json
from pathlib import Path
from typing import Any

from cruijff_kit.compat import TransformerDecoder, llama3_2, lora_llama3_2
from cruijff_kit.errors import UserError


def architecture(checkpoint_dir: str) -> dict[str, Any]:
    """Arguments of torchtune's llama3_2 builders for a Hugging Face folder.

    Raises:
        UserError: no config.json, or an architecture that these builders cannot represent, named with the reason.
    """
    path = Path(checkpoint_dir).expanduser() / "config.json"
    if not path.is_file():
        raise UserError(f"model.path: {path.parent} has no config.json; give a model folder in Hugging Face's layout")
    c = json.loads(path.read_text(encoding="utf-8"))
    heads, dim = c.get("num_attention_heads"), c.get("hidden_size")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}  # transformers 5 and 4
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    reasons = {
        f"model_type is {c.get('model_type')!r}, not 'llama'": c.get("model_type") != "llama",
        f"rope scaling of type {rope_type!r}": rope_type != "default",
        "attention_bias": c.get("attention_bias"),
        "mlp_bias": c.get("mlp_bias"),
        f"head_dim {c.get('head_dim')} is not hidden_size / num_attention_heads": (
            c.get("head_dim") and c["head_dim"] * heads != dim
        ),
        f"activation {c.get('hidden_act')!r}": c.get("hidden_act", "silu") != "silu",
    }
    wrong = [reason for reason, found in reasons.items() if found]
    if wrong:
        raise UserError(f"model.path: {path.parent} is not a plain Llama: {'; '.join(wrong)}")
    return {
        "vocab_size": c["vocab_size"],
        "num_layers": c["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": c.get("num_key_value_heads", heads),
        "embed_dim": dim,
        "intermediate_dim": c["intermediate_size"],
        "max_seq_len": c["max_position_embeddings"],
        "norm_eps": c["rms_norm_eps"],
        "rope_base": int(rope.get("rope_theta") or c.get("rope_theta") or 10_000),
        "tie_word_embeddings": c.get("tie_word_embeddings", False),
        "scale_factor": 1,  # turns torchtune's Llama-3 rope scaling into the identity
    }


def hf_llama(checkpoint_dir: str) -> TransformerDecoder:
    """The base model without adapters. Raises UserError as `architecture`."""
    return llama3_2(**architecture(checkpoint_dir))


def lora_hf_llama(
    checkpoint_dir: str,
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
) -> TransformerDecoder:
    """The model with LoRA layers; arguments as torchtune's lora_llama3_2. Raises UserError as `architecture`."""
    shape = architecture(checkpoint_dir)
    if apply_lora_to_output and shape["tie_word_embeddings"]:
        raise UserError("apply_lora_to_output: this model's output shares the embedding's weights; set it to false")
    return lora_llama3_2(
        lora_attn_modules,
        apply_lora_to_mlp,
        apply_lora_to_output,
        **shape,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
    )
