"""The decoder of a Hugging Face folder (Llama, Mistral, Qwen2.5), put together from torchtune's modules.

One builder for all sizes and families: every number comes from the folder's config.json (`read_architecture`).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from cruijff_kit.models.compat import (
    FeedForward,
    Llama3ScaledRoPE,
    LoRALinear,
    MultiHeadAttention,
    RMSNorm,
    TiedLinear,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from cruijff_kit.models.dora import BiasedDoRALinear
from cruijff_kit.models.hf_config import ROPE_TYPES, Architecture, read_architecture
from cruijff_kit.util.errors import UserError

# (name of a layer, inputs, outputs, bias) -> the layer, with or without an adapter
_Linear = Callable[[str, int, int, bool], nn.Module]


class LinearScaledRoPE(Llama3ScaledRoPE):
    """Rotary positions whose frequencies are all divided by scale_factor (Chen et al. 2023, arXiv 2306.15595)."""

    def apply_scaling(self, freqs: torch.Tensor, scale_factor: float, *_: float) -> torch.Tensor:
        """[head_dim / 2] frequencies -> the same, scaled."""
        return freqs / scale_factor


def hf_llama(checkpoint_dir: str) -> TransformerDecoder:
    """The base model without adapters. Raises UserError as `read_architecture`."""
    return _decoder(read_architecture(checkpoint_dir), lambda name, *shape: nn.Linear(*shape))


def lora_hf_llama(
    checkpoint_dir: str,
    lora_attn_modules: list[str],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
) -> TransformerDecoder:
    """The model with LoRA layers; arguments as those of torchtune's LoRA builders.

    Args:
        checkpoint_dir: folder with config.json.
        lora_attn_modules: of q_proj, k_proj, v_proj, output_proj.
        apply_lora_to_mlp: also the MLP's three projections.
        apply_lora_to_output: also the output projection; not where it shares the embedding's weights.
        lora_rank: rank of the update.
        lora_alpha: the update is scaled by alpha / rank.
        lora_dropout: probability of dropping an input of the update in training.
        use_dora: weight-decomposed (Liu et al. 2024, arXiv 2402.09353): a magnitude per output is learnt too.
        quantize_base: said here for `models.base`, which fills in the layers' weights in 4 bits.
    Raises:
        UserError: as `read_architecture`; or `apply_lora_to_output` with tied weights.
    """
    shape = read_architecture(checkpoint_dir)
    if apply_lora_to_output and shape.tie_word_embeddings:
        raise UserError(
            "lora.apply_to_output=true: this model's output shares the embedding's weights, so it cannot have an adapter "
            "of its own; set lora.apply_to_output=false"
        )
    adapted = {*lora_attn_modules}
    adapted |= {"w1", "w2", "w3"} if apply_lora_to_mlp else set()
    adapted |= {"output"} if apply_lora_to_output else set()
    adapter = partial(
        BiasedDoRALinear if use_dora else LoRALinear, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout
    )

    def linear(name: str, inputs: int, outputs: int, bias: bool) -> nn.Module:
        return adapter(inputs, outputs, use_bias=bias) if name in adapted else nn.Linear(inputs, outputs, bias)

    return _decoder(shape, linear)


def _rope(a: Architecture) -> Llama3ScaledRoPE:
    kind = a.rope_scaling["rope_type"]
    make = LinearScaledRoPE if kind == "linear" else Llama3ScaledRoPE
    # In the order of torchtune's arguments; scaling by a factor of 1 is none.
    scaling = [a.rope_scaling[name] for name in ROPE_TYPES[kind]] or [1]
    return make(a.head_dim, a.max_seq_len, a.rope_base, *scaling)


def _decoder(a: Architecture, linear: _Linear) -> TransformerDecoder:
    rope = _rope(a)
    layers = [
        TransformerSelfAttentionLayer(
            attn=_attention(a, linear, rope),
            mlp=FeedForward(
                gate_proj=linear("w1", a.embed_dim, a.intermediate_dim, a.mlp_bias),
                down_proj=linear("w2", a.intermediate_dim, a.embed_dim, a.mlp_bias),
                up_proj=linear("w3", a.embed_dim, a.intermediate_dim, a.mlp_bias),
            ),
            sa_norm=RMSNorm(a.embed_dim, eps=a.norm_eps),
            mlp_norm=RMSNorm(a.embed_dim, eps=a.norm_eps),
        )
        for _ in range(a.num_layers)
    ]
    embeddings = nn.Embedding(a.vocab_size, a.embed_dim)
    tied = a.tie_word_embeddings
    decoder = TransformerDecoder(
        tok_embeddings=embeddings,
        layers=nn.ModuleList(layers),
        max_seq_len=a.max_seq_len,
        num_heads=a.num_heads,
        head_dim=a.head_dim,
        norm=RMSNorm(a.embed_dim, eps=a.norm_eps),
        output=TiedLinear(embeddings) if tied else linear("output", a.embed_dim, a.vocab_size, False),
    )
    decoder.window = a.window  # for whoever explains max_seq_len
    return decoder


def _attention(a: Architecture, linear: _Linear, rope: nn.Module) -> MultiHeadAttention:
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    return MultiHeadAttention(
        # Only compared with the heads, which need not divide the model's width when config.json sets head_dim.
        embed_dim=queries,
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        q_proj=linear("q_proj", a.embed_dim, queries, a.attention_bias),
        k_proj=linear("k_proj", a.embed_dim, keys, a.attention_bias),
        v_proj=linear("v_proj", a.embed_dim, keys, a.attention_bias),
        output_proj=linear("output_proj", queries, a.embed_dim, a.output_bias),
        pos_embeddings=rope,
        max_seq_len=a.max_seq_len,
    )
