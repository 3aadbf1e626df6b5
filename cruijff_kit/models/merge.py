"""Merge an adapter into a model folder's weights: W + alpha / rank x B A, read and written shard by shard.

All names are Hugging Face's, so any adapter in PEFT's format can be merged. DoRA scales each row to its trained magnitude.
The result holds no adapter_config.json, because transformers would apply the adapter a second time.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cruijff_kit.models.adapter_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.files import atomic

SHARD_BYTES = 5 * 10**9
_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt", ".gguf", ".index.json", ".lock")
_PARAMETERS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")


def merge(base_folder: str | Path, adapter_folder: str | Path, to: str | Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the base model with the adapter merged, in the base's precision. The folder is complete or absent.

    Args:
        base_folder: Hugging Face folder with safetensors files.
        adapter_folder: adapter_model.safetensors and adapter_config.json, as `models.adapter.save_adapter` writes them.
        to: folder to write; it must not exist.
        shard_bytes: maximum size of a file, in bytes.
    Returns:
        The folder.
    Raises:
        UserError: the folder exists, the base model is missing, or the adapter does not fit it.
    """
    base, to = Path(base_folder).expanduser(), Path(to).expanduser()
    if to.exists():
        raise UserError(f"{to} exists already; choose another folder")
    files = _weight_files(base)
    adapter = AdapterUpdates(Path(adapter_folder).expanduser())
    with atomic(to) as draft:
        draft.mkdir()
        _copy_rest(base, draft)
        _write_shards(_merge_tensors(files, adapter), draft, shard_bytes)
        adapter.check_applied(base)
    return to


class AdapterUpdates:
    """The weight updates of an adapter folder in PEFT's format."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        rank = settings["r"]
        self.folder, self.dora = folder, settings.get("use_dora", False)
        self.scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        self.parameters: dict[str, dict[str, torch.Tensor]] = {}
        """Name of a weight -> the adapter's parameters that change it, by suffix (_PARAMETERS)."""
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                suffix = next((p for p in _PARAMETERS if name.endswith(p)), None)
                if suffix is None:
                    raise UserError(f"{folder} holds {name}, which is no parameter of LoRA or DoRA")
                module = name.removeprefix("base_model.model.").removesuffix(suffix)
                self.parameters.setdefault(f"{module}.weight", {})[suffix] = file.get_tensor(name).float()
        self.applied: set[str] = set()
        """Names of the weights that were updated."""

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the updated weight, [out_dim, in_dim], computed in fp32, in the weight's precision."""
        if name not in self.parameters:
            return weight
        self.applied.add(name)
        a, b, magnitude = (self.parameters[name].get(suffix) for suffix in _PARAMETERS)
        updated = weight.float() + self.scale * (b @ a)
        if self.dora:
            updated *= (magnitude / torch.linalg.norm(updated, dim=1))[:, None]
        return updated.to(weight.dtype)

    def check_applied(self, base: Path) -> None:
        """Check that the base has every weight that the adapter changes.

        Raises:
            UserError: it lacks one.
        """
        if missing := sorted(self.parameters.keys() - self.applied):
            raise UserError(
                f"{base} has no {missing[0]}, which the adapter in {self.folder} changes: it is another model"
            )


def _weight_files(base: Path) -> list[Path]:
    if not base.is_dir():
        raise UserError(f"the base model {base} is missing; restore it")
    index = base / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(f.name for f in base.glob("*.safetensors"))
    missing = [name for name in names or ["model.safetensors"] if not (base / name).is_file()]
    if missing:
        raise UserError(f"the base model {base} has no {missing[0]}; restore that file")
    return [base / name for name in names]


def _copy_rest(base: Path, to: Path) -> None:
    """Copy configuration, tokenizer, chat template and licence: all files but the weights."""
    for file in base.iterdir():
        if file.is_file() and not file.name.startswith((".", "adapter_")) and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, to / file.name)


def _merge_tensors(files: list[Path], adapter: AdapterUpdates) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118 (not a dict)
                yield name, adapter.apply(name, shard.get_tensor(name))


def _write_shards(tensors: Iterator[tuple[str, torch.Tensor]], to: Path, shard_bytes: int) -> None:
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        nonlocal size
        path = to / f"shard-{len(shards)}"
        save_file({name: t.contiguous() for name, t in pending.items()}, path, {"format": "pt"})
        shutil.copymode(to / "config.json", path)  # safetensors lets only the owner read its file
        shards.append(list(pending))
        pending.clear()
        size = 0

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        weight_map = {weight: name for name, weights in zip(names, shards, strict=True) for weight in weights}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (to / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for i, name in enumerate(names):
        (to / f"shard-{i}").rename(to / name)
