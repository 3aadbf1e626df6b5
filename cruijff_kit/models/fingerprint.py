"""Hash a base model: every byte of its weights, configurations and tokenizer. No torch.

A file's hash is its plain SHA-256, as `sha256sum` and the Hugging Face hub show it. The cache keeps the hash until the
file's size, modification time, change time or inode changes. Setting the modification time back after an edit changes the
change time. A cache that cannot be read or written costs time, nothing else.
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
_CHUNK_BYTES = 1 << 20  # bytes per read
_MAX_THREADS = 8  # files hashed at once: a disk gives no more
_PROGRESS_BYTES = 2 << 30  # a progress bar is shown from this size on: hashing takes a second or two
# A file that changed within the last 2 s is not cached: on a file system with a coarse clock, its next change could have
# the same time.
_MIN_AGE_NS = 2_000_000_000
_LOCK_TIMEOUT = 600  # seconds to wait for another process that hashes the same model

_cache: dict[str, dict[str, dict]] = {}  # folder -> file name -> {"stat": ..., "sha256": ...}


def fingerprint(folder: Path | str) -> str:
    """Return 16 hex digits: a hash over the names and hashes of `hash_files`."""
    lines = [f"{name} {digest}\n" for name, digest in hash_files(folder).items()]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


def hash_files(folder: Path | str) -> dict[str, str]:
    """Return name -> SHA-256 (hex) of the model's files in a folder, sorted by name. Cached files are not read again."""
    folder = Path(os.path.realpath(Path(folder).expanduser()))
    files = sorted({f for pattern in _NAMES for f in folder.glob(pattern) if f.is_file()})
    cache_file = cache_dir() / "fingerprints" / f"{hashlib.sha256(str(folder).encode()).hexdigest()[:16]}.json"
    entries = _cache.get(str(folder)) or _read_cache(cache_file)
    if all(_is_unchanged(f.name, _file_stat(f), entries) for f in files):
        return {f.name: entries[f.name]["sha256"] for f in files}
    with _lock(cache_file):
        entries = entries | _read_cache(cache_file)  # another process may have hashed the files meanwhile
        stats = {f.name: _file_stat(f) for f in files}
        hashes = {name: entries[name]["sha256"] for name, stat in stats.items() if _is_unchanged(name, stat, entries)}
        hashes |= _hash_in_threads([f for f in files if f.name not in hashes])
        now = time.time_ns()
        old = [f for f in files if _file_stat(f) == stats[f.name] and abs(now - max(stats[f.name][1:3])) > _MIN_AGE_NS]
        _cache[str(folder)] = {f.name: {"stat": stats[f.name], "sha256": hashes[f.name]} for f in old}
        with contextlib.suppress(OSError):
            write_text(cache_file, json.dumps({"folder": str(folder), "files": _cache[str(folder)]}, indent=1) + "\n")
    return {f.name: hashes[f.name] for f in files}


def _file_stat(file: Path) -> list[int]:
    """Return size, modification time, change time and inode, one of which changes with the file."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _is_unchanged(name: str, stat: list[int], entries: dict[str, dict]) -> bool:
    return entries.get(name, {}).get("stat") == stat


def _read_cache(cache_file: Path) -> dict[str, dict]:
    """Read name -> {stat, sha256} of a folder's files; empty if the cache file cannot be read."""
    try:
        files = json.loads(cache_file.read_text(encoding="utf-8"))["files"]
        return {name: entry for name, entry in files.items() if len(entry["sha256"]) == 64 and entry["stat"]}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return {}


@contextlib.contextmanager
def _lock(cache_file: Path) -> Iterator[None]:
    """Hold a cache file's lock, or none where the file system cannot lock."""
    lock = FileLock(cache_file.with_suffix(".lock"))
    with contextlib.suppress(OSError, NotImplementedError):  # Timeout is an OSError, too
        cache_file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=_LOCK_TIMEOUT)
    try:
        yield
    finally:
        lock.release()


def _hash_in_threads(files: list[Path]) -> dict[str, str]:
    """Hash files, several at once: 1.8 GB/s a core with SHA instructions (0.9 where its sibling is busy)."""
    total, stop = sum(f.stat().st_size for f in files), threading.Event()
    is_long = total >= _PROGRESS_BYTES
    progress_bar = progress("hashing the base model, MB", total >> 20) if is_long else contextlib.nullcontext()
    with progress_bar as bar, ThreadPoolExecutor(max(1, min(len(files), os.cpu_count() or 1, _MAX_THREADS))) as pool:
        advance = (lambda size: bar.advance(steps=size >> 20)) if bar else (lambda size: None)
        try:
            return dict(zip((f.name for f in files), pool.map(lambda f: _sha256(f, advance, stop), files), strict=True))
        finally:
            stop.set()  # after Ctrl-C nobody waits for the rest


def _sha256(file: Path, advance: Callable[[int], None], stop: threading.Event) -> str:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_CHUNK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while (size := stream.readinto(buffer)) and not stop.is_set():
            digest.update(buffer[:size])
            advance(size)
    return digest.hexdigest()
