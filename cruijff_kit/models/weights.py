"""Weights of a Hugging Face folder under torchtune's names, and back: names, and the order of rotated rows.

torchtune rotates neighbouring rows of a head (0 and 1, 2 and 3, ...), Hugging Face row i of a head's first half with row i
of its second half; so whatever multiplies into queries and keys is reordered: weights, biases, and an adapter's B.
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
# Modules, Hugging Face's name -> torchtune's: those of a layer, and those outside.
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
_BACK = {ours: theirs for theirs, ours in (LAYER_MODULES | OTHER_MODULES).items()}


def to_torchtune(module: str) -> str:
    """torchtune's name of a Hugging Face module; KeyError if there is none."""
    layer = _LAYER.fullmatch(module)
    return f"layers.{layer[2]}.{LAYER_MODULES[layer[3]]}" if layer else OTHER_MODULES[module]


def to_hugging_face(module: str) -> str:
    """Hugging Face's name of a torchtune module; KeyError if there is none."""
    layer = _LAYER.fullmatch(module)
    return f"model.layers.{layer[2]}.{_BACK[layer[3]]}" if layer else _BACK[module]


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Hugging Face's order of rotated rows -> torchtune's; [heads x head_dim, ...]."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def deinterleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """torchtune's order of rotated rows -> Hugging Face's; [heads x head_dim, ...]."""
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


class HFCheckpointer:
    """Reads the safetensors files of a Llama, Mistral or Qwen2 folder, as torchtune's FullModelHFCheckpointer would.

    That one knows neither biases in Llama nor lets go of a shard before it has read the next. `output_dir`,
    `recipe_checkpoint` and `model_type` are its arguments, which this one does not need: the recipes save adapters, and
    config.json says what the model is.
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
        """All weights under torchtune's names, in the files' precision."""
        return {MODEL_KEY: dict(self.tensors())}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """torchtune's name and value, one weight at a time.

        Raises:
            UserError: a file is broken, or holds a weight that these architectures do not have.
        """
        shape = read_architecture(self.folder)
        heads = {"attn.q_proj": shape.num_heads, "attn.k_proj": shape.num_kv_heads}
        for file in self.files:
            for name, tensor in _read(self.folder / file):
                module, _, parameter = name.rpartition(".")
                if parameter == "inv_freq" or (module == "lm_head" and shape.tie_word_embeddings):
                    continue  # computed from config.json; the same as the embedding
                try:
                    ours = to_torchtune(module)
                except KeyError:
                    raise UserError(
                        f"model.path: {self.folder / file} holds {name}, which no {shape.family} has"
                    ) from None
                rotated = heads.get(ours.split(".", 2)[-1])
                parameter = "scale" if ours.endswith("norm") else parameter
                yield f"{ours}.{parameter}", interleave(tensor, rotated) if rotated else tensor


def _read(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                yield name, opened.get_tensor(name)
    except OSError as error:
        raise UserError(f"model.path: {file} cannot be read: {error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(
            f"model.path: {file} is not a complete safetensors file ({error}); download it again"
        ) from error
