"""Whether a base model is still the same: a hash of its folder that does not take reading gigabytes. No torch."""

import hashlib
from pathlib import Path

_NAMES = ("config.json", "generation_config.json", "special_tokens_map.json", "model.safetensors.index.json")
_SMALL = 32 << 20  # bytes up to which a file is read whole
_PIECE, _PIECES = 64 << 10, 32  # of a larger one: its beginning, its end, and pieces in between


def fingerprint(folder: Path | str) -> str:
    """16 hex digits over the weights, configurations and the tokenizer in a folder; of large files over parts of them.

    A model that was trained on has other values nearly everywhere, so that it does not take every byte to tell.
    """
    digest = hashlib.sha256()
    for file in sorted(Path(folder).expanduser().iterdir()):
        named = file.name in _NAMES or file.suffix in (".safetensors", ".jinja") or file.name.startswith("tokenizer")
        if named and file.is_file():
            digest.update(f"{file.name} {file.stat().st_size} ".encode())
            for piece in _pieces(file):
                digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(file: Path):
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= _SMALL:
            while piece := opened.read(1 << 20):
                yield piece
            return
        for n in range(_PIECES):
            opened.seek((size - _PIECE) * n // (_PIECES - 1))
            yield opened.read(_PIECE)
