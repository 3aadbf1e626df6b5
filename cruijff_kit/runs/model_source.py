"""Find the model that a command names: the folder of a run (its adapter), an adapter or a base model, or settings.

No torch at import.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cruijff_kit.config import data_policy
from cruijff_kit.config.explain import explain_errors
from cruijff_kit.config.overrides import parse_overrides
from cruijff_kit.config.run import RunConfig
from cruijff_kit.data import tiers
from cruijff_kit.models.adapter_files import is_adapter_folder
from cruijff_kit.records.archive_manifest import reject_archived, require_epochs
from cruijff_kit.records.result import read_result
from cruijff_kit.records.run_folder import RunFolder
from cruijff_kit.util.errors import UserError

_MACHINE = ("device", "dtype", "threads", "gpus")  # what may differ from the run's own
_WHO = ("agent", "dataset.permission")


@dataclass(frozen=True)
class ModelRef:
    """An existing model: a base model, alone or with an adapter."""

    config: RunConfig
    """Config of the run, or a composed one; its dataset names the default rows."""
    adapter: Path | None = None
    """Folder of the adapter; None for the base model alone."""
    is_peft: bool = False
    """Whether the adapter is from PEFT and not from a run of cruijff_kit."""
    epoch: int | None = None
    """Epoch of a run's adapter, counted from 0."""

    @property
    def adapter_path(self) -> str | None:
        """The adapter's folder as text, for reports."""
        return str(self.adapter) if self.adapter else None

    def check_access(self, file: Path | None = None) -> str:
        """Refuse what the tier of the run's data, or of a file with texts, forbids, before it is read; the tier.

        Raises:
            UserError: a coding agent without permission, or a wrong TIER file.
        """
        tier = tiers.strictest_tier([self.config.dataset.tier, *([tiers.find_tier(file)] if file else [])])
        data_policy.enable_redaction_for(tier)
        data_policy.check_agent(tier, self.config.dataset.permission, self.config.agent)
        return tier

    def summary(self) -> str:
        """Return the model in a few words."""
        if self.adapter is None:
            return f"{self.config.model.name} (base model)"
        epoch = "" if self.epoch is None else f", epoch {self.epoch}"
        return f"{self.config.model.name} with {self.config.run_name}{epoch}"


def find_model(
    where: Path | None,
    overrides: list[str],
    config_dir: str | None = None,
    epoch: int | None = None,
    base_model: bool = False,
) -> ModelRef:
    """Find the model that a command line names.

    Args:
        where: a run's folder, an adapter's or a model's; None: `overrides` name a base model.
        overrides: of a run device, dtype, threads and gpus; else as for cruijff_kit.train.
        config_dir: folder with YAML of the user's.
        epoch: of a run's adapter, counted from 0; None: the last one that was saved.
        base_model: the base model alone.
    Raises:
        UserError: there is no such model, or it is ambiguous.
    """
    if where is not None and not where.is_dir():
        raise UserError(f"no such folder: {where}")
    if where is not None and ((where / "result.json").is_file() or (where / "config.yaml").is_file()):
        return _find_run(where, overrides, epoch, base_model)
    if epoch is not None:
        raise UserError("--epoch chooses among the adapters of a run; give a run's folder")
    if where is not None and is_adapter_folder(where):
        return _find_adapter(where.absolute(), overrides, config_dir, base_model)
    if where is not None and (where / "config.json").is_file():
        overrides = [*model_overrides(where, overrides), *overrides]
    elif where is not None:
        raise UserError(f"{where} holds no run, no adapter and no model; give the folder of one")
    elif not has_override(overrides, "model") and not has_override(overrides, "model.path"):
        raise UserError("name a model: a run's folder, an adapter's, model=NAME, or model=hf_llama model.path=DIR")
    return ModelRef(_compose(overrides, config_dir))


def _find_run(run: Path, overrides: list[str], epoch: int | None, base_model: bool) -> ModelRef:
    folder, config = RunFolder(run), _load_config(run, overrides)
    result = read_result(folder.result) if folder.result.exists() else None
    if result:
        config.dataset.tier = tiers.strictest_tier([config.dataset.tier, result.tier])
    from_elsewhere = result.paths.get("adapter") if result else None
    if base_model or (result and result.settings.get("lora.rank") is None):
        return ModelRef(config)
    if from_elsewhere:
        return ModelRef(config, Path(from_elsewhere), is_peft=True)
    saved = require_epochs(folder)
    if epoch is not None and epoch not in saved:
        reject_archived(folder.path, [epoch])
        epochs = ", ".join(map(str, saved))
        raise UserError(f"{folder.path} holds no adapter of epoch {epoch}; there: {epochs} (counted from 0)")
    epoch = saved[-1] if epoch is None else epoch
    return ModelRef(config, folder.epoch(epoch), epoch=epoch)


def _load_config(run: Path, overrides: list[str]) -> RunConfig:
    """Load a run's config with the overrides of its machine."""
    from cruijff_kit.records.saved_config import load_saved_config

    config = load_saved_config(run)
    with explain_errors():
        parsed = parse_overrides(overrides)
    values: dict[str, Any] = {o.key_or_group: o.value() for o in parsed}
    config.dataset.permission = values.pop("dataset.permission", config.dataset.permission)
    if fixed_keys := [key for key in values if key not in (*_MACHINE, *_WHO)]:
        raise UserError(f"{fixed_keys[0]}: the run's settings are fixed; only {', '.join(_MACHINE)} can differ")
    for key in ("threads", "gpus"):
        if not isinstance(values.get(key, 1), int):
            raise UserError(f"{key}={values[key]} is not a whole number")
    processes = {"nproc_per_node": values["gpus"]} if values.get("gpus") else {}
    cfg = config.torchtune | {k: v for k, v in values.items() if k not in ("gpus", "agent")} | processes
    return dataclasses.replace(config, **values, torchtune=cfg)


def _find_adapter(adapter: Path, overrides: list[str], config_dir: str | None, base_model: bool) -> ModelRef:
    name_override = [] if has_override(overrides, "run_name") else [f"run_name={repr_text(adapter.name)}"]
    config = _compose([*adapter_overrides(adapter, overrides), *name_override, *overrides], config_dir)
    return ModelRef(config, None if base_model else adapter, is_peft=True)


def _compose(overrides: list[str], config_dir: str | None) -> RunConfig:
    from cruijff_kit.config.compose import compose

    return compose(overrides, config_dir)


def adapter_overrides(adapter: Path, overrides: list[str]) -> list[str]:
    """Return the overrides that an adapter's files imply: the lora group, and its base model unless one is given.

    Raises:
        UserError: it names no model that is here, or rank, alpha or modules were typed.
    """
    from cruijff_kit.models.external_adapter import base_model_name, lora_settings

    if lora_overrides := [o for o in overrides if o.lstrip("+").startswith("lora")]:
        raise UserError(f"{lora_overrides[0]}: rank, alpha and modules are the adapter's own; leave lora out")
    lora = [f"lora.{k}={json.dumps(v).replace(' ', '')}" for k, v in lora_settings(adapter).items()]
    if has_override(overrides, "model") or has_override(overrides, "model.path"):
        return lora
    base_name = base_model_name(adapter)
    if not Path(base_name).expanduser().is_dir():
        raise UserError(
            f"{adapter} names {base_name or 'no model'} as its base model, which is not a folder here; "
            "set model=NAME, or model=hf_llama model.path=DIR"
        )
    return [*lora, *model_overrides(Path(base_name).expanduser(), overrides)]


def model_overrides(folder: Path, overrides: list[str]) -> list[str]:
    """Return the overrides that choose the model in a folder."""
    model_override = [] if has_override(overrides, "model") else ["model=hf_llama"]
    return [*model_override, f"model.path={repr_text(str(folder.absolute()))}"]


def has_override(overrides: list[str], key: str) -> bool:
    """Return whether an override sets a key."""
    return any(o.lstrip("+").startswith(f"{key}=") for o in overrides)


def repr_text(text: str) -> str:
    """Quote text for Hydra's grammar."""
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
