"""Download a base model that has a source of its own (`model.download`). No torch."""

import shlex
from pathlib import Path

from cruijff_kit.config.groups import ModelConfig
from cruijff_kit.models import smollm2
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.suggest import did_you_mean


def fetch(model: ModelConfig) -> None:
    """Download the model if its folder is missing and `model.download` names a source.

    Raises:
        UserError: the folder is missing and there is no source, or the download failed.
    """
    sources = {"smollm2_135m_instruct": smollm2.fetch}
    if model.download is not None:
        if model.download not in sources:
            hint = did_you_mean(model.download, [*sources])
            raise UserError(f"model.download={model.download} does not exist; {hint}")
        sources[model.download](Path(model.path))
    elif not Path(model.path).is_dir():
        fix = "put the model's files there; or set model.path=DIR"
        if model.hub is not None:
            fix = f"type: {download_command(model)}; or set models_dir=DIR or model.path=DIR"
        raise UserError(f"model.path: no such folder {model.path}; {fix}")


def download_command(model: ModelConfig) -> str:
    """Return the shell command that downloads a model of the Hugging Face hub to `model.path`."""
    exclude = f" --exclude '{model.hub_exclude}'" if model.hub_exclude else ""
    return f"hf download {model.hub} --local-dir {shlex.quote(model.path)}{exclude}"
