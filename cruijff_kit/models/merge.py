"""A model folder with an adapter merged into its weights: W + alpha / rank x B A, read and written shard by shard.

Under Hugging Face's names throughout, so whatever PEFT's layout describes can be merged; with DoRA each row is then brought
to its learnt length. The result is a plain model: it holds no adapter_config.json, for which transformers would apply the
adapter a second time.
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
_PARTS = (".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector")


def merge(base_folder: str | Path, adapter_folder: str | Path, to: str | Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the base model with the adapter merged in, in the base's precision; the folder appears whole or not at all.

    Args:
        base_folder: Hugging Face folder with safetensors files.
        adapter_folder: adapter_model.safetensors and adapter_config.json, as `models.adapter.save_adapter` writes them.
        to: folder to make.
        shard_bytes: most bytes per file.
    Raises:
        UserError: the folder exists, the base is gone, or the adapter does not fit it.
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
        adapter.check_used(base)
    return to


class AdapterUpdates:
    """An adapter folder in PEFT's format, as updates of weights."""

    def __init__(self, folder: Path) -> None:
        settings = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        rank = settings["r"]
        self.folder, self.dora = folder, settings.get("use_dora", False)
        self.scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        self.parts: dict[str, dict[str, torch.Tensor]] = {}
        with safe_open(folder / ADAPTER_WEIGHTS, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                part = next((p for p in _PARTS if name.endswith(p)), None)
                if part is None:
                    raise UserError(f"{folder} holds {name}, which is neither LoRA's nor DoRA's")
                module = name.removeprefix("base_model.model.").removesuffix(part)
                self.parts.setdefault(f"{module}.weight", {})[part] = file.get_tensor(name).float()
        self.used: set[str] = set()

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight [outputs, inputs] with its update, computed in fp32, in its own precision; as it is if it has none."""
        if name not in self.parts:
            return weight
        self.used.add(name)
        a, b, *_ = (self.parts[name].get(part) for part in _PARTS)
        full = weight.float() + self.scale * (b @ a)
        if self.dora:
            full *= (self.parts[name][_PARTS[2]] / torch.linalg.norm(full, dim=1))[:, None]
        return full.to(weight.dtype)

    def check_used(self, base: Path) -> None:
        """Refuse a base that lacks weights which the adapter changes."""
        if left := sorted(self.parts.keys() - self.used):
            raise UserError(f"{base} has no {left[0]}, which the adapter in {self.folder} changes: it is another model")


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
        raise UserError(f"the base model {base} has no {missing[0]}; put it back there")
    return [base / name for name in names]


def _copy_rest(base: Path, to: Path) -> None:
    """Configuration, tokenizer, chat template, licence: everything that is no weight."""
    for file in base.iterdir():
        if file.is_file() and not file.name.startswith((".", "adapter_")) and not file.name.endswith(_WEIGHTS):
            shutil.copyfile(file, to / file.name)


def _merge_tensors(files: list[Path], adapter: AdapterUpdates) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dict)
                yield name, adapter.merged(name, opened.get_tensor(name))


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
        where = {weight: name for name, weights in zip(names, shards, strict=True) for weight in weights}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (to / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for i, name in enumerate(names):
        (to / f"shard-{i}").rename(to / name)
