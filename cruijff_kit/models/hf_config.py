"""What a model folder's config.json says of its decoder, and whether torchtune's modules can represent it. No torch.

Llama, Mistral and Qwen2 (Qwen2.5 included) are one decoder with other numbers: grouped attention with rotary positions,
RMS norms before each half of a layer, a gated SiLU MLP, and biases in some places.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.util.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2")
# Kinds of rotary scaling -> the parameters that they need.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Families that people ask for -> what torchtune's modules lack for them.
_OTHERS = {
    "mixtral": "a mixture of experts",
    "qwen2_moe": "a mixture of experts",
    "qwen3_moe": "a mixture of experts",
    "llama4": "a mixture of experts",
    "qwen3": "it normalises queries and keys (q_norm, k_norm) before the rotation",
    "gemma": "its norms scale by 1 + weight and its embeddings by a constant",
    "gemma2": "its norms scale by 1 + weight and its logits are capped",
    "gemma3_text": "its norms scale by 1 + weight and its layers have several rotary bases",
    "phi3": "its projections are fused (qkv_proj, gate_up_proj)",
    "olmo2": "its norms stand behind each half of a layer",
    "gpt2": "it has learnt positions and layer norms",
}
_SLIDING_WINDOW = 4096  # transformers' default for both families where config.json leaves it out
_QWEN2_FULL_LAYERS = 28  # and Qwen2's of max_window_layers


@dataclass(frozen=True)
class Architecture:
    """The numbers of a decoder, named as torchtune's builders name them."""

    family: str
    vocab_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    embed_dim: int
    intermediate_dim: int
    max_seq_len: int
    """Maximum number of tokens; at most the sliding window, so that the window never takes effect."""
    norm_eps: float
    rope_base: float
    rope_scaling: dict[str, Any]
    """rope_type and its parameters, named as in transformers (ROPE_TYPES)."""
    attention_bias: bool
    """Of the query, key and value projections."""
    output_bias: bool
    """Of attention's output projection."""
    mlp_bias: bool
    tie_word_embeddings: bool
    window: int | None
    """Length of the sliding window, if any."""


def read_architecture(checkpoint_dir: str | Path) -> Architecture:
    """The architecture of a Hugging Face folder.

    Raises:
        UserError: no config.json, a malformed one, or an architecture that cannot be built, with every reason.
    """
    path = Path(checkpoint_dir).expanduser() / "config.json"
    if not path.is_file():
        raise UserError(f"model.path: {path.parent} has no config.json; give a model folder in Hugging Face's layout")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.path: {path} is not JSON: {error}") from error
    if wrong := list(_refusals(settings)):
        raise UserError(f"model.path: {path.parent} cannot be trained: {'; '.join(wrong)}")
    try:
        return _read(settings)
    except KeyError as error:
        raise UserError(f"model.path: {path} lacks {error.args[0]}") from error


def _rope(c: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 writes rope_parameters; before, rope_scaling (maybe with `type`) stood beside rope_theta."""
    rope = dict(c.get("rope_parameters") or c.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", c.get("rope_theta", 10_000.0))
    return rope


def _refusals(c: dict[str, Any]) -> Iterator[str]:
    family = c.get("model_type")
    if family not in FAMILIES:
        reason = f" ({_OTHERS[family]})" if family in _OTHERS else ""
        yield f"model_type {family!r}{reason}; supported: {', '.join(FAMILIES)}"
        return
    rope = _rope(c)
    if rope["rope_type"] not in ROPE_TYPES:
        yield f"rope scaling of type {rope['rope_type']!r}; supported: {', '.join(ROPE_TYPES)}"
    if rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "partial_rotary_factor: only a part of each head is rotated"
    if c.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {c['hidden_act']!r}, not 'silu'"
    if c.get("quantization_config"):
        yield f"its weights are quantized ({c['quantization_config'].get('quant_method')}); take the unquantized model"
    heads, groups = c.get("num_attention_heads"), c.get("num_key_value_heads")
    if heads and groups and heads % groups:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}"


def _window(c: dict[str, Any]) -> int | None:
    window = c.get("sliding_window", _SLIDING_WINDOW)
    if c["model_type"] == "mistral":
        return window
    if c["model_type"] != "qwen2" or not c.get("use_sliding_window", False):
        return None
    full = c.get("max_window_layers", _QWEN2_FULL_LAYERS)
    kinds = c.get("layer_types") or ["sliding_attention"] * (c["num_hidden_layers"] > full)
    return window if "sliding_attention" in kinds else None


def _read(c: dict[str, Any]) -> Architecture:
    family, rope, window = c["model_type"], _rope(c), _window(c)
    for key in ROPE_TYPES[rope["rope_type"]]:
        if key not in rope:
            raise KeyError(f"rope_scaling.{key}")
    heads, dim, positions = c["num_attention_heads"], c["hidden_size"], c["max_position_embeddings"]
    llama_bias = family == "llama" and bool(c.get("attention_bias"))
    return Architecture(
        family=family,
        vocab_size=c["vocab_size"],
        num_layers=c["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=(c.get("num_key_value_heads") or heads) if family == "llama" else c["num_key_value_heads"],
        head_dim=c.get("head_dim") or dim // heads,
        embed_dim=dim,
        intermediate_dim=c["intermediate_size"],
        max_seq_len=min(positions, window or positions),
        norm_eps=c["rms_norm_eps"],
        rope_base=float(rope["rope_theta"]),
        rope_scaling=rope,
        attention_bias=llama_bias or family == "qwen2",
        output_bias=llama_bias,
        mlp_bias=family == "llama" and bool(c.get("mlp_bias")),
        tie_word_embeddings=c.get("tie_word_embeddings", False),
        window=window,
    )
