"""Texts that are nearly the same: their own words by MinHash, and the true similarity of what it proposes.

Broder (1997), "On the resemblance and containment of documents". Vectorised with numpy; the same rows give the same pairs.
Words count, not their order: a text whose words were shuffled is found, too.
"""

import difflib
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from cruijff_kit.data.conversations import Conversation

if TYPE_CHECKING:
    import numpy

SIMILAR = 0.7  # weighed Jaccard similarity of words from which on two texts are near duplicates: 1 word of 6 differs
_PROPOSED = 0.5  # the similarity from which on misspelt words are looked for
_OWN = 3  # fewest words that a text must have beside what many share
_UNLIKELY = 3.0  # nats: pairs that share as much by chance are expected in exp(-3) = 5% of such data sets
_LETTERS = 50_000_000  # of all texts together are looked at: of each its beginning and its end
_COMMON = 0.05  # a word that stands in a larger share of the texts (and in more than _FEW) is shared by many
_FEW = 5
_BANDS, _PER_BAND = 20, 4  # two texts of similarity 0.7 meet in a band with probability 0.996, of 0.2 with 0.03
_PARTNERS = 5  # texts of a band, in each split, that a text is compared with
_FEWEST = 2  # words in which texts may differ that are compared letter by letter
_MISSPELT, _SAME_WORD = 4, 0.8  # letters that such a word must have, and how similar it must be: one letter of five
_AT_ONCE = 20_000  # pairs whose words are held beside each other
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|\w+(?:[.'-]\w+)*")  # scripts without spaces: a letter is a word

Pair = tuple[str, Conversation, str, Conversation]


def fold(text: str) -> str:
    """Return a text without case, extra blanks, and the punctuation at its end."""
    plain = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return plain.rstrip(" .,;:!?…。！？") or plain


def find_near_duplicates(splits: dict[str, list[Conversation]], within: bool = True) -> Iterator[Pair]:
    """(split, row, the same or a later split, row): alike, not the same when folded. A lower bound where many are alike.

    Args:
        splits: the rows, by split.
        within: also pairs inside a split.
    """
    texts = [(split, text, same) for split, rows in splits.items() for text, same in _group_by_text(rows).items()]
    if len(texts) < 2:
        return
    words = _distinct_words([text for _, text, _ in texts])
    place = {split: n for n, split in enumerate(splits)}
    numbers = _encode_words(words)
    places = [place[split] for split, _, _ in texts]
    for a, b in _filter_similar(words, numbers, places, _propose_pairs(numbers, places, within)):
        (first, one, mine), (second, other, theirs) = texts[a], texts[b]
        if one == other:
            continue
        yield from ((first, mine[0], second, row) for row in theirs if first != second or row.row > mine[0].row)
        if first == second:
            yield from ((first, theirs[0], second, row) for row in mine if row.row > theirs[0].row)


def _group_by_text(rows: list[Conversation]) -> dict[str, list[Conversation]]:
    """Folded text -> the rows that have it. (Each for itself would make the words of a text that stands often common.)"""
    groups: dict[str, list[Conversation]] = {}
    for row in rows:
        groups.setdefault(fold(" ".join(row.values)), []).append(row)
    return groups


def _distinct_words(texts: list[str]) -> list[set[str]]:
    """Return the words of each text except those that many texts share; an empty set if fewer than _OWN remain."""
    most = max(400, _LETTERS // len(texts))
    words = [{*_WORD.findall(_cut_middle(text, most))} for text in texts]
    holders = Counter(itertools.chain.from_iterable(words))
    common = {word for word, count in holders.items() if count > max(_FEW, _COMMON * len(texts))}
    return [own if len(own := w - common) >= _OWN else set() for w in words]


def _cut_middle(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most // 2]} {text[-(most // 2) :]}"


def _encode_words(words: list[set[str]]) -> "list[numpy.ndarray]":
    """Encode the words as numbers from 0 on."""
    import numpy as np

    codes: dict[str, int] = {}
    return [np.array([codes.setdefault(w, len(codes)) for w in of], dtype=np.int64) for of in words]


def _propose_pairs(words: "list[numpy.ndarray]", splits: list[int], within: bool) -> "numpy.ndarray":
    """Pairs of texts that agree in all hashes of a band, as two rows of numbers, the smaller one above.

    Args:
        words: of each text, as numbers. splits: the number of its split, not decreasing. within: as near_pairs.
    """
    import numpy as np

    texts = np.array([i for i, w in enumerate(words) if len(w)])
    if len(texts) < 2:
        return np.empty((2, 0), dtype=np.int64)
    flat = np.concatenate([words[i] for i in texts])
    starts = np.cumsum([0] + [len(words[i]) for i in texts[:-1]])
    split_of, most = np.array(splits)[texts], max(splits) + 1
    draw = np.random.default_rng(0)
    proposed = []
    for _ in range(_BANDS):
        band = np.zeros(len(texts), dtype=np.uint64)
        for _ in range(_PER_BAND):
            ranks = draw.permutation(np.uint64(flat.max() + 1))
            band = band * np.uint64(0x9E3779B97F4A7C15) + np.minimum.reduceat(ranks[flat], starts)
        order = np.argsort(band, kind="stable")
        bucket = np.cumsum(np.diff(band[order], prepend=band[order[:1]]) != 0)
        proposed += [order[pair] for pair in _partners(bucket, split_of[order], most, within)]
    pairs = np.sort(np.concatenate(proposed, axis=1), axis=0)
    once = np.sort(pairs[0] * len(texts) + pairs[1])
    return texts[np.stack(np.divmod(once[np.flatnonzero(np.diff(once, prepend=-1))], len(texts)))]


def _partners(bucket: "numpy.ndarray", split: "numpy.ndarray", most: int, within: bool) -> "Iterator[numpy.ndarray]":
    """Pairs of places that share a bucket: each with the first ones of every split before its own (or of its own, too).

    Args:
        bucket: number of the bucket of each place, not decreasing; inside one, splits do not decrease. most: splits.
    """
    import numpy as np

    place, group = np.arange(len(bucket)), bucket * most + split
    for other in range(most):
        first = np.searchsorted(group, bucket * most + other)
        end = np.searchsorted(group, bucket * most + other, side="right")
        for n in range(_PARTNERS):
            fits = (first + n < np.minimum(end, place)) & ((split != other) | within)
            yield np.stack([first[fits] + n, place[fits]])


def _filter_similar(
    words: list[set[str]], numbers: "list[numpy.ndarray]", splits: list[int], pairs: "numpy.ndarray"
) -> Iterator[tuple[int, int]]:
    """Yield the pairs whose similarity is at least SIMILAR and is not due to chance.

    By chance two texts share words that weigh w in exp(-w) of all pairs.

    Args:
        words: of each text. numbers: the same as numbers. splits: as _proposed. pairs: what that gives.
    """
    import numpy as np

    if not pairs.size:
        return
    from scipy.sparse import csr_array

    flat, ends = np.concatenate(numbers), np.cumsum([0, *map(len, numbers)])
    weight = _weights(flat, np.repeat(np.arange(len(words)), np.diff(ends)), len(words))
    table = csr_array((np.sqrt(weight[flat]), flat, ends))
    table.sort_indices()
    whole = table.multiply(table).sum(axis=1)
    by_split = np.bincount(splits)
    least = np.log(by_split[:, None] * by_split[None, :]) + _UNLIKELY
    for at in range(0, pairs.shape[1], _AT_ONCE):
        a, b = pairs[:, at : at + _AT_ONCE]
        shared = table[a].multiply(table[b]).sum(axis=1)
        similar = shared / (whole[a] + whole[b] - shared)
        enough = shared >= least[np.array(splits)[a], np.array(splits)[b]]
        for i in np.flatnonzero(enough & (similar >= _PROPOSED)):
            if similar[i] >= SIMILAR or _similarity(words[a[i]], words[b[i]]) >= SIMILAR:
                yield int(a[i]), int(b[i])


def _weights(word: "numpy.ndarray", text: "numpy.ndarray", texts: int) -> "numpy.ndarray":
    """Return the weight of each word: log(texts / texts with it), divided among words that always occur together.

    So the five words of a label ("farming, fishing and forestry workers") do not outweigh the two numbers in which two
    people differ. Words of a few texts each count in full: a text and its near copies are all that has them.

    Args:
        word, text: a word's number, and that of a text that has it. texts: how many there are.
    """
    import numpy as np

    holders = np.bincount(word)
    # The sum of a random number for each holder is the same for words with the same holders, and for no others.
    mark = np.bincount(word, weights=np.random.default_rng(1).random(texts)[text])
    _, group, size = np.unique(mark, return_inverse=True, return_counts=True)
    return np.log(texts / holders) / np.where(holders > _FEW, size[group], 1)


def _similarity(one: set[str], other: set[str]) -> float:
    """Return the Jaccard similarity of two sets of words; misspelt words count as shared.

    Return 0 if nothing is misspelt, or if more than _FEWEST words of one set are not in the other.
    """
    left, right = one - other, other - one
    if max(len(left), len(right)) > _FEWEST:
        return 0.0
    misspelt = sum(any(_is_misspelt(x, y) for y in right) for x in left)
    shared = len(one & other) + misspelt
    return shared / (len(one) + len(other) - shared) if misspelt else 0.0


def _is_misspelt(one: str, other: str) -> bool:
    """Return whether two words differ in about one letter. Numbers never count as misspelt."""
    long = min(len(one), len(other)) >= _MISSPELT and one.isalpha() and other.isalpha()
    return long and difflib.SequenceMatcher(None, one, other).ratio() >= _SAME_WORD
