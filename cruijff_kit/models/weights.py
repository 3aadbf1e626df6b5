"""Convert weights between Hugging Face and torchtune: names, and the order of rows that rotary positions rotate.

torchtune rotates neighbouring rows of a head (0 and 1, 2 and 3, ...); Hugging Face rotates row i of a head's first half
with row i of its second half. So the rows of everything that produces queries and keys are reordered: weights, biases, and
an adapter's B.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from cruijff_kit.models.compat import MODEL_KEY
from cruijff_kit.models.hf_config import read_architecture
from cruijff_kit.util.errors import UserError

_LAYER = re.compile(r"(model\.)?layers\.(\d+)\.(.+)")
# Hugging Face's module name -> torchtune's, inside a layer and outside the layers.
LAYER_MODULES = {
    "self_attn.q_proj": "attn.q_proj",
    "self_attn.k_proj": "attn.k_proj",
    "self_attn.v_proj": "attn.v_proj",
    "self_attn.o_proj": "attn.output_proj",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
    "input_layernorm": "sa_norm",
    "post_attention_layernorm": "mlp_norm",
}
OTHER_MODULES = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
_TO_HUGGING_FACE = {torchtune: hugging_face for hugging_face, torchtune in (LAYER_MODULES | OTHER_MODULES).items()}


def to_torchtune(module: str) -> str:
    """Return torchtune's name of a Hugging Face module.

    Raises:
        KeyError: torchtune has no such module.
    """
    layer = _LAYER.fullmatch(module)
    return f"layers.{layer[2]}.{LAYER_MODULES[layer[3]]}" if layer else OTHER_MODULES[module]


def to_hugging_face(module: str) -> str:
    """Return Hugging Face's name of a torchtune module.

    Raises:
        KeyError: Hugging Face has no such module.
    """
    layer = _LAYER.fullmatch(module)
    return f"model.layers.{layer[2]}.{_TO_HUGGING_FACE[layer[3]]}" if layer else _TO_HUGGING_FACE[module]


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rotated rows from Hugging Face's order to torchtune's; [heads x head_dim, ...]."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def deinterleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder rotated rows from torchtune's order to Hugging Face's; [heads x head_dim, ...]."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


class HFCheckpointer:
    """Reads the safetensors files of a Llama, Mistral or Qwen2 folder, in place of torchtune's FullModelHFCheckpointer.

    torchtune's class does not support biases in Llama, and keeps a shard in memory until it has read the next one. Its
    arguments `output_dir`, `recipe_checkpoint` and `model_type` are accepted and ignored: the recipes save adapters, and
    config.json names the architecture.
    """

    def __init__(
        self,
        checkpoint_dir: str,
        checkpoint_files: list[str],
        output_dir: str | None = None,
        recipe_checkpoint: None = None,
        model_type: str | None = None,
    ) -> None:
        self.folder, self.files = Path(checkpoint_dir).expanduser(), list(checkpoint_files)

    def load_checkpoint(self) -> dict[str, Any]:
        """Read all weights: {"model": {torchtune's name: value}}, in the files' precision."""
        return {MODEL_KEY: dict(self.tensors())}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield torchtune's name and value of each weight; one shard is in memory at a time.

        Raises:
            UserError: a file is broken, or holds a weight that these architectures do not have.
        """
        architecture = read_architecture(self.folder)
        heads = {"attn.q_proj": architecture.num_heads, "attn.k_proj": architecture.num_kv_heads}
        for file in self.files:
            for name, tensor in _read_tensors(self.folder / file):
                module, _, parameter = name.rpartition(".")
                if parameter == "inv_freq" or (module == "lm_head" and architecture.tie_word_embeddings):
                    continue  # inv_freq is computed from config.json; a tied lm_head equals the embedding
                try:
                    torchtune_module = to_torchtune(module)
                except KeyError:
                    raise UserError(
                        f"model.path: {self.folder / file} holds {name}, which no {architecture.family} has"
                    ) from None
                rotary_heads = heads.get(torchtune_module.split(".", 2)[-1])
                parameter = "scale" if torchtune_module.endswith("norm") else parameter
                yield f"{torchtune_module}.{parameter}", interleave(tensor, rotary_heads) if rotary_heads else tensor


def _read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                yield name, shard.get_tensor(name)
    except OSError as error:
        raise UserError(f"model.path: {file} cannot be read: {error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(
            f"model.path: {file} is not a complete safetensors file ({error}); download it again"
        ) from error
