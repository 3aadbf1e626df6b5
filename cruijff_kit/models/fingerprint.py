"""Whether a base model is still the same: a hash over every byte of its weights, configurations and tokenizer. No torch.

Each file's hash is its plain SHA-256, which `sha256sum` and the Hugging Face hub show too. It is kept in the cache and
holds as long as the file's size, its times of writing and of change and its inode do: putting the time of writing back
after an edit changes the time of change. A cache that cannot be read or written costs time, nothing else.
"""

import contextlib
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from cruijff_kit.util.cache import cache_dir
from cruijff_kit.util.files import write_text
from cruijff_kit.util.progress import progress

_NAMES = (
    "config.json", "generation_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "tokenizer*", "*.jinja", "*.safetensors", "*.index.json", "pytorch_model*.bin", "consolidated*.pth",
)  # fmt: skip
_PIECE = 1 << 20  # bytes read at a time
_THREADS = 8  # files hashed at once, at most: a disk gives no more
_LONG = 2 << 30  # bytes from which on a bar is shown: a second or two
_RECENT = (
    2_000_000_000  # ns: a file changed so shortly ago may change again unseen, where a file system's clock is coarse
)
_WAIT = 600  # seconds for another process that reads the same model

_known: dict[str, dict[str, dict]] = {}


def fingerprint(folder: Path | str) -> str:
    """16 hex digits over the names and hashes of `file_hashes`."""
    lines = [f"{name} {digest}\n" for name, digest in file_hashes(folder).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def file_hashes(folder: Path | str) -> dict[str, str]:
    """Name -> SHA-256 in hex of the model's files in a folder, by name; what was hashed before is not read again."""
    folder = Path(os.path.realpath(Path(folder).expanduser()))
    files = sorted({f for pattern in _NAMES for f in folder.glob(pattern) if f.is_file()})
    place = cache_dir() / "fingerprints" / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
    known = _known.get(str(folder)) or _read(place)
    if not _lacking(files, known):
        return {f.name: known[f.name]["sha256"] for f in files}
    with _locked(place):
        known = known | _read(place)  # another process may have hashed them meanwhile
        hashes = {f.name: known[f.name]["sha256"] for f in files if f not in _lacking(files, known)}
        seen = {f.name: _seen(f) for f in files}
        hashes |= _hash([f for f in files if f.name not in hashes])
        now = time.time_ns()
        settled = [f for f in files if _seen(f) == seen[f.name] and abs(now - max(seen[f.name][1:3])) > _RECENT]
        _known[str(folder)] = {f.name: {"seen": seen[f.name], "sha256": hashes[f.name]} for f in settled}
        with contextlib.suppress(OSError):
            write_text(place, json.dumps({"folder": str(folder), "files": _known[str(folder)]}, indent=1) + "\n")
    return {f.name: hashes[f.name] for f in files}


def _seen(file: Path) -> list[int]:
    """What changes when a file does."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _lacking(files: list[Path], known: dict[str, dict]) -> list[Path]:
    return [f for f in files if known.get(f.name, {}).get("seen") != _seen(f)]


def _read(place: Path) -> dict[str, dict]:
    """What the cache knows of a folder: name -> seen, sha256; nothing where it cannot be read."""
    try:
        files = json.loads(place.read_text(encoding="utf-8"))["files"]
        return {name: entry for name, entry in files.items() if len(entry["sha256"]) == 64 and entry["seen"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


@contextlib.contextmanager
def _locked(place: Path) -> Iterator[None]:
    """Alone with a file of the cache, or, where it cannot be locked, not."""
    lock = FileLock(place.with_suffix(".lock"))
    with contextlib.suppress(OSError, NotImplementedError):  # Timeout is an OSError, too
        place.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_WAIT)
    try:
        yield
    finally:
        lock.release()


def _hash(files: list[Path]) -> dict[str, str]:
    """Name -> SHA-256, several files at once: 1.8 GB/s a core with SHA instructions (0.9 where its sibling is busy)."""
    total, stop = sum(f.stat().st_size for f in files), threading.Event()
    bar = progress("hashing the base model, MB", total >> 20) if total >= _LONG else contextlib.nullcontext()
    with bar as shown, ThreadPoolExecutor(max(1, min(len(files), os.cpu_count() or 1, _THREADS))) as pool:
        advance = (lambda size: shown.advance(steps=size >> 20)) if shown else (lambda size: None)
        try:
            return dict(zip((f.name for f in files), pool.map(lambda f: _sha256(f, advance, stop), files), strict=True))
        finally:
            stop.set()  # after Ctrl-C nobody waits for the rest


def _sha256(file: Path, advance: Callable[[int], None], stop: threading.Event) -> str:
    digest, piece = hashlib.sha256(), memoryview(bytearray(_PIECE))
    with file.open("rb", buffering=0) as opened:
        while (size := opened.readinto(piece)) and not stop.is_set():
            digest.update(piece[:size])
            advance(size)
    return digest.hexdigest()
