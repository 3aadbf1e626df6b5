"""Read a decoder's architecture from a model folder's config.json; refuse what torchtune's modules lack. No torch.

Llama, Mistral and Qwen2 (Qwen2.5 included) are the same decoder with other hyperparameters: grouped-query attention with
rotary positions, RMS norms before attention and MLP, a gated SiLU MLP, and optional biases.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.util.errors import UserError

FAMILIES = ("llama", "mistral", "qwen2")
# Type of rotary scaling -> its parameters.
ROPE_TYPES = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# Unsupported family -> what torchtune's modules lack for it.
_UNSUPPORTED = {
    "mixtral": "a mixture of experts",
    "qwen2_moe": "a mixture of experts",
    "qwen3_moe": "a mixture of experts",
    "llama4": "a mixture of experts",
    "qwen3": "it normalises queries and keys (q_norm, k_norm) before the rotation",
    "gemma": "its norms scale by 1 + weight and its embeddings by a constant",
    "gemma2": "its norms scale by 1 + weight and its logits are capped",
    "gemma3_text": "its norms scale by 1 + weight and its layers have several rotary bases",
    "phi3": "its projections are fused (qkv_proj, gate_up_proj)",
    "olmo2": "its norms follow attention and MLP",
    "gpt2": "it has learned positions and layer norms",
}
_SLIDING_WINDOW = 4096  # transformers' default of sliding_window for Mistral and Qwen2
_QWEN2_FULL_LAYERS = 28  # transformers' default of max_window_layers for Qwen2


@dataclass(frozen=True)
class Architecture:
    """Hyperparameters of a decoder, under the names that torchtune's builders use."""

    family: str
    """One of FAMILIES (model_type of config.json)."""
    vocab_size: int
    """Number of rows of the embedding."""
    num_layers: int
    """Number of decoder layers."""
    num_heads: int
    """Number of query heads per layer."""
    num_kv_heads: int
    """Number of key and value heads per layer."""
    head_dim: int
    """Dimension of a head."""
    embed_dim: int
    """Dimension of the hidden states."""
    intermediate_dim: int
    """Dimension inside the MLP."""
    max_seq_len: int
    """Maximum number of tokens; at most the sliding window, so that the window never takes effect."""
    norm_eps: float
    """Epsilon of the RMS norms."""
    rope_base: float
    """Base of the rotary frequencies (rope_theta)."""
    rope_scaling: dict[str, Any]
    """rope_type and its parameters, named as in transformers (ROPE_TYPES)."""
    attention_bias: bool
    """Whether the query, key and value projections have a bias."""
    output_bias: bool
    """Whether attention's output projection has a bias."""
    mlp_bias: bool
    """Whether the MLP's projections have a bias."""
    tie_word_embeddings: bool
    """Whether the output projection is the embedding."""
    window: int | None
    """Length of the sliding window in tokens; None for full attention."""


def read_architecture(checkpoint_dir: str | Path) -> Architecture:
    """Read the architecture of a Hugging Face folder.

    Raises:
        UserError: config.json is missing or malformed, or the architecture is not supported (all reasons are listed).
    """
    path = Path(checkpoint_dir).expanduser() / "config.json"
    if not path.is_file():
        raise UserError(f"model.path: {path.parent} has no config.json; give a model folder in Hugging Face's layout")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"model.path: {path} is not JSON: {error}") from error
    if reasons := list(_find_unsupported(settings)):
        raise UserError(f"model.path: {path.parent} cannot be trained: {'; '.join(reasons)}")
    try:
        return _make_architecture(settings)
    except KeyError as error:
        raise UserError(f"model.path: {path} lacks {error.args[0]}") from error


def _read_rope(settings: dict[str, Any]) -> dict[str, Any]:
    # transformers 5 writes rope_parameters; earlier versions wrote rope_theta and rope_scaling (some with `type`).
    rope = dict(settings.get("rope_parameters") or settings.get("rope_scaling") or {})
    rope.setdefault("rope_type", rope.pop("type", "default"))
    rope.setdefault("rope_theta", settings.get("rope_theta", 10_000.0))
    return rope


def _find_unsupported(settings: dict[str, Any]) -> Iterator[str]:
    family = settings.get("model_type")
    if family not in FAMILIES:
        reason = f" ({_UNSUPPORTED[family]})" if family in _UNSUPPORTED else ""
        yield f"model_type {family!r}{reason}; supported: {', '.join(FAMILIES)}"
        return
    rope = _read_rope(settings)
    if rope["rope_type"] not in ROPE_TYPES:
        yield f"rope scaling of type {rope['rope_type']!r}; supported: {', '.join(ROPE_TYPES)}"
    if rope.get("partial_rotary_factor", settings.get("partial_rotary_factor", 1.0)) != 1.0:
        yield "partial_rotary_factor: only part of each head is rotated"
    if settings.get("hidden_act", "silu") != "silu":
        yield f"hidden_act {settings['hidden_act']!r}, not 'silu'"
    if quantization := settings.get("quantization_config"):
        yield f"its weights are quantized ({quantization.get('quant_method')}); use the unquantized model"
    heads, kv_heads = settings.get("num_attention_heads"), settings.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        yield f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"


def _read_window(settings: dict[str, Any]) -> int | None:
    window = settings.get("sliding_window", _SLIDING_WINDOW)
    if settings["model_type"] == "mistral":
        return window
    if settings["model_type"] != "qwen2" or not settings.get("use_sliding_window", False):
        return None
    full = settings.get("max_window_layers", _QWEN2_FULL_LAYERS)
    kinds = settings.get("layer_types") or ["sliding_attention"] * (settings["num_hidden_layers"] > full)
    return window if "sliding_attention" in kinds else None


def _make_architecture(settings: dict[str, Any]) -> Architecture:
    family, rope, window = settings["model_type"], _read_rope(settings), _read_window(settings)
    for key in ROPE_TYPES[rope["rope_type"]]:
        if key not in rope:
            raise KeyError(f"rope_scaling.{key}")
    heads, dim, positions = (
        settings["num_attention_heads"],
        settings["hidden_size"],
        settings["max_position_embeddings"],
    )
    llama_bias = family == "llama" and bool(settings.get("attention_bias"))
    return Architecture(
        family=family,
        vocab_size=settings["vocab_size"],
        num_layers=settings["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=(
            (settings.get("num_key_value_heads") or heads) if family == "llama" else settings["num_key_value_heads"]
        ),
        head_dim=settings.get("head_dim") or dim // heads,
        embed_dim=dim,
        intermediate_dim=settings["intermediate_size"],
        max_seq_len=min(positions, window or positions),
        norm_eps=settings["rms_norm_eps"],
        rope_base=float(rope["rope_theta"]),
        rope_scaling=rope,
        attention_bias=llama_bias or family == "qwen2",
        output_bias=llama_bias,
        mlp_bias=family == "llama" and bool(settings.get("mlp_bias")),
        tie_word_embeddings=settings.get("tie_word_embeddings", False),
        window=window,
    )
