"""Base models that make their own folder: name (`model.download`) -> function(folder). No torch."""

import shlex
from pathlib import Path

from cruijff_kit.config.groups import ModelConfig
from cruijff_kit.models import smollm2
from cruijff_kit.util.errors import UserError
from cruijff_kit.util.suggest import did_you_mean


def fetch(model: ModelConfig) -> None:
    """Make the model's folder if it is missing and a source for it is known.

    Raises:
        UserError: the folder is missing and there is no source, or the source could not be reached.
    """
    sources = {"smollm2_135m_instruct": smollm2.fetch}
    if model.download is not None:
        if model.download not in sources:
            hint = did_you_mean(model.download, [*sources])
            raise UserError(f"model.download={model.download} does not exist; {hint}")
        sources[model.download](Path(model.path))
    elif not Path(model.path).is_dir():
        get = "put the model's files there; or set model.path=DIR"
        if model.hub is not None:
            get = f"type: {download_command(model)}; or set models_dir=DIR or model.path=DIR"
        raise UserError(f"model.path: no such folder {model.path}; {get}")


def download_command(model: ModelConfig) -> str:
    """The shell command that downloads a model of the hub to where it is expected."""
    exclude = f" --exclude '{model.hub_exclude}'" if model.hub_exclude else ""
    return f"hf download {model.hub} --local-dir {shlex.quote(model.path)}{exclude}"
