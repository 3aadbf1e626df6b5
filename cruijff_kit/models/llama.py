"""Build the decoder of a Hugging Face folder (Llama, Mistral, Qwen2.5) from torchtune's modules.

One builder serves all sizes and families: every hyperparameter comes from the folder's config.json (`read_architecture`).
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

# (torchtune's name, in_dim, out_dim, bias) -> a linear layer, with or without an adapter
_MakeLinear = Callable[[str, int, int, bool], nn.Module]


class LinearScaledRoPE(Llama3ScaledRoPE):
    """Rotary positions with all frequencies divided by scale_factor (Chen et al. 2023, arXiv 2306.15595)."""

    def apply_scaling(self, freqs: torch.Tensor, scale_factor: float, *_: float) -> torch.Tensor:
        """Scale the frequencies, [head_dim / 2]."""
        return freqs / scale_factor


def hf_llama(checkpoint_dir: str) -> TransformerDecoder:
    """Build the base model without adapters.

    Args:
        checkpoint_dir: folder with config.json.
    Raises:
        UserError: as `read_architecture`.
    """
    return _build_decoder(read_architecture(checkpoint_dir), lambda name, *shape: nn.Linear(*shape))


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
    """Build the model with LoRA layers; the arguments are those of torchtune's LoRA builders.

    Args:
        checkpoint_dir: folder with config.json.
        lora_attn_modules: attention layers to adapt: q_proj, k_proj, v_proj, output_proj.
        apply_lora_to_mlp: adapt the MLP's three projections too.
        apply_lora_to_output: adapt the output projection too; impossible if it shares the embedding's weights.
        lora_rank: rank of the update.
        lora_alpha: the update is scaled by alpha / rank.
        lora_dropout: probability of dropping an input of the update in training.
        use_dora: DoRA (Liu et al. 2024, arXiv 2402.09353): train a magnitude per output too.
        quantize_base: not used here; `models.base_model.read_base` reads it and quantizes the layers' weights to 4 bits.
    Raises:
        UserError: as `read_architecture`; or `apply_lora_to_output` with tied weights.
    """
    architecture = read_architecture(checkpoint_dir)
    if apply_lora_to_output and architecture.tie_word_embeddings:
        raise UserError(
            "lora.apply_to_output=true: this model's output shares the embedding's weights, so it cannot have an adapter "
            "of its own; set lora.apply_to_output=false"
        )
    modules = {*lora_attn_modules}
    modules |= {"w1", "w2", "w3"} if apply_lora_to_mlp else set()
    modules |= {"output"} if apply_lora_to_output else set()
    make_adapter = partial(
        BiasedDoRALinear if use_dora else LoRALinear, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout
    )

    def make_linear(name: str, in_dim: int, out_dim: int, bias: bool) -> nn.Module:
        return make_adapter(in_dim, out_dim, use_bias=bias) if name in modules else nn.Linear(in_dim, out_dim, bias)

    return _build_decoder(architecture, make_linear)


def _build_rope(a: Architecture) -> Llama3ScaledRoPE:
    rope_type = a.rope_scaling["rope_type"]
    rope_class = LinearScaledRoPE if rope_type == "linear" else Llama3ScaledRoPE
    # In the order of torchtune's arguments; a factor of 1 does not scale.
    scaling = [a.rope_scaling[name] for name in ROPE_TYPES[rope_type]] or [1]
    return rope_class(a.head_dim, a.max_seq_len, a.rope_base, *scaling)


def _build_decoder(a: Architecture, make_linear: _MakeLinear) -> TransformerDecoder:
    rope = _build_rope(a)
    layers = [
        TransformerSelfAttentionLayer(
            attn=_build_attention(a, make_linear, rope),
            mlp=FeedForward(
                gate_proj=make_linear("w1", a.embed_dim, a.intermediate_dim, a.mlp_bias),
                down_proj=make_linear("w2", a.intermediate_dim, a.embed_dim, a.mlp_bias),
                up_proj=make_linear("w3", a.embed_dim, a.intermediate_dim, a.mlp_bias),
            ),
            sa_norm=RMSNorm(a.embed_dim, eps=a.norm_eps),
            mlp_norm=RMSNorm(a.embed_dim, eps=a.norm_eps),
        )
        for _ in range(a.num_layers)
    ]
    embeddings = nn.Embedding(a.vocab_size, a.embed_dim)
    is_tied = a.tie_word_embeddings
    decoder = TransformerDecoder(
        tok_embeddings=embeddings,
        layers=nn.ModuleList(layers),
        max_seq_len=a.max_seq_len,
        num_heads=a.num_heads,
        head_dim=a.head_dim,
        norm=RMSNorm(a.embed_dim, eps=a.norm_eps),
        output=TiedLinear(embeddings) if is_tied else make_linear("output", a.embed_dim, a.vocab_size, False),
    )
    decoder.window = a.window  # messages about max_seq_len mention it
    return decoder


def _build_attention(a: Architecture, make_linear: _MakeLinear, rope: nn.Module) -> MultiHeadAttention:
    q_dim, kv_dim = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    return MultiHeadAttention(
        # torchtune only checks it against num_heads, which need not divide the model's width if config.json sets head_dim.
        embed_dim=q_dim,
        num_heads=a.num_heads,
        num_kv_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        q_proj=make_linear("q_proj", a.embed_dim, q_dim, a.attention_bias),
        k_proj=make_linear("k_proj", a.embed_dim, kv_dim, a.attention_bias),
        v_proj=make_linear("v_proj", a.embed_dim, kv_dim, a.attention_bias),
        output_proj=make_linear("output_proj", q_dim, a.embed_dim, a.output_bias),
        pos_embeddings=rope,
        max_seq_len=a.max_seq_len,
    )
