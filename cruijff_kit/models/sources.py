"""Base models that make their own folder: name (`model.download`) -> function(folder). No torch."""

from pathlib import Path

from cruijff_kit.errors import UserError
from cruijff_kit.hints import did_you_mean


def fetch(download: str | None, folder: str) -> None:
    """Make the model's folder if it is missing and a source for it is known.

    Raises:
        UserError: the folder is missing and there is no source, or the source could not be reached.
    """
    from cruijff_kit.models import smollm2

    sources = {"smollm2_135m_instruct": smollm2.fetch}
    if download is not None:
        if download not in sources:
            raise UserError(f"model.download={download} does not exist; {did_you_mean(download, [*sources])}")
        sources[download](Path(folder))
    elif not Path(folder).is_dir():
        raise UserError(f"model.path: no such folder {folder}; put the model's files there or set model.path=DIR")
