"""Longer texts that are nearly the same: three words in a row, MinHash, and the true similarity of what it proposes.

Broder (1997), "On the resemblance and containment of documents". Vectorised with numpy; the same rows give the same pairs.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cruijff_kit.data.conversations import Conversation

if TYPE_CHECKING:
    import numpy

SIMILAR = 0.8  # Jaccard similarity of the threes of two rows, from which on they are near duplicates
_WORDS = 12  # a shorter text is no longer prompt
_LETTERS = 50_000_000  # of all texts together are looked at: of each its beginning and its end
_OWN = 8  # fewest threes that a row must have beside what many rows share
_COMMON = 0.05  # a three that stands in a larger share of the rows (and in more than _FEW) is shared by many
_FEW = 5
_BANDS, _PER_BAND = 10, 4  # two rows of similarity 0.8 meet in a band with probability 0.995, of 0.4 with 0.23
_LOOK_BACK = 5  # rows of a band that a row is compared with
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+(?:[.'-]\w+)*")  # scripts without spaces: a letter is a word

Pair = tuple[str, Conversation, str, Conversation]


def near_pairs(splits: dict[str, list[Conversation]]) -> Iterator[Pair]:
    """(split, row, the same or a later split, row): alike, not the same. A lower bound where very many are alike."""
    rows = [(split, c) for split, of_split in splits.items() for c in of_split]
    long = [r for r in rows if sum(map(len, r[1].values)) >= 2 * _WORDS]
    most = max(400, _LETTERS // max(1, len(long)))
    words = [_WORD.findall(_ends(" ".join(c.values), most).casefold()) for _, c in long]
    kept = [i for i, w in enumerate(words) if len(w) >= _WORDS]
    if len(kept) < 2:
        return
    threes = _threes([words[i] for i in kept])
    for a, b in sorted(_proposed(threes)):
        (first, one), (second, other) = long[kept[a]], long[kept[b]]
        if one.messages != other.messages and _similarity(threes[a], threes[b]) >= SIMILAR:
            yield first, one, second, other


def _ends(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} {text[-(most // 2) :]}"


def _threes(words: list[list[str]]) -> "list[numpy.ndarray]":
    """Of each text the set of its threes, as sorted numbers, without those that many texts share."""
    import numpy as np

    codes: dict[str, int] = {}
    flat = np.array([codes.setdefault(w, len(codes)) for text in words for w in text], dtype=np.uint64)
    size = np.uint64(len(codes) + 1)
    three = flat[:-2] * size * size + flat[1:-1] * size + flat[2:]  # wraps around where there are millions of words
    text = np.repeat(np.arange(len(words)), [len(w) for w in words])
    whole = text[:-2] == text[2:]  # not across two texts
    text, three = text[:-2][whole], _numbered(three[whole])
    count = int(three.max()) + 1
    once = np.sort(text * count + three)  # np.unique takes a hundred times as long
    text, three = np.divmod(once[np.flatnonzero(np.diff(once, prepend=-1))], count)
    common = np.bincount(three) > max(_FEW, _COMMON * len(words))
    own = ~common[three]
    return np.split(three[own], np.cumsum(np.bincount(text[own], minlength=len(words)))[:-1])


def _numbered(values: "numpy.ndarray") -> "numpy.ndarray":
    """The same array with 0, 1, 2 ... for its distinct values."""
    import numpy as np

    order = np.argsort(values)
    ranks = np.empty(len(values), dtype=np.int64)
    ranks[order] = np.cumsum(np.diff(values[order], prepend=values[order[:1]]) != 0)
    return ranks


def _proposed(threes: "list[numpy.ndarray]") -> set[tuple[int, int]]:
    """Pairs of texts that agree in all hashes of a band."""
    import numpy as np

    texts = np.array([i for i, t in enumerate(threes) if len(t) >= _OWN])
    if len(texts) < 2:
        return set()
    flat = np.concatenate([threes[i] for i in texts]).astype(np.uint64) + np.uint64(1)
    starts = np.cumsum([0] + [len(threes[i]) for i in texts[:-1]])
    draw = np.random.default_rng(0)
    found = set()
    for _ in range(_BANDS):
        band = np.zeros(len(texts), dtype=np.uint64)
        for _ in range(_PER_BAND):
            odd, add = draw.integers(1, 2**63, size=2, dtype=np.uint64)
            mixed = flat * (odd | np.uint64(1)) + add
            band = band * np.uint64(0x9E3779B97F4A7C15) + np.minimum.reduceat(mixed ^ (mixed >> np.uint64(32)), starts)
        order = np.argsort(band, kind="stable")
        bucket = band[order]
        for back in range(1, min(_LOOK_BACK, len(order) - 1) + 1):
            for i in np.flatnonzero(bucket[back:] == bucket[:-back]):
                found.add((int(texts[order[i]]), int(texts[order[i + back]])))
    return found


def _similarity(a: "numpy.ndarray", b: "numpy.ndarray") -> float:
    import numpy as np

    shared = len(np.intersect1d(a, b, assume_unique=True))
    return shared / (len(a) + len(b) - shared)
