"""13-grams of words: which documents repeat each other, and how much of one set of texts is in another.

A text is read as its lower-cased words (letters, digits, underscore); a 13-gram is 13 consecutive words, a shorter text is one gram
of all its words. Grams are compared by a 64-bit hash.
"""

import re
import zlib
from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Int32, UInt64

GRAM = 13
_WORD = re.compile(r"\w+")
# One odd multiplier per position; a gram's hash is the wrapping sum of (word hash * multiplier), mixed.
_MULTIPLIERS = np.random.default_rng([13]).integers(0, 2**64, GRAM, dtype=np.uint64) | np.uint64(1)
# Above this many characters only every s-th hash is kept (the same ones in every document, so shares stay unbiased).
_FULL = 200_000_000
# A gram found in more documents than this (a licence) is compared with the first of them only: pairs stay linear in the text.
_CROWD = 32


def grams(text: str) -> UInt64[np.ndarray, " n"]:
    """Hashes of a text's 13-grams, in order, repeats included."""
    words = _WORD.findall(text.lower())
    if not words:
        return np.zeros(0, np.uint64)
    known = {w: zlib.crc32(w.encode("utf-8", "surrogatepass")) << 32 | zlib.adler32(w.encode("utf-8", "surrogatepass")) for w in set(words)}
    ids = _mix(np.fromiter((known[w] for w in words), np.uint64, len(words)))
    n = max(len(words) - GRAM + 1, 1)
    total = np.zeros(n, np.uint64)
    for j in range(min(GRAM, len(words))):
        total += ids[j : j + n] * _MULTIPLIERS[j]
    return _mix(total)


def gram_pool(texts: Iterable[str]) -> UInt64[np.ndarray, " n"]:
    """The distinct 13-grams of texts, sorted."""
    return np.unique(np.concatenate([np.zeros(0, np.uint64), *map(grams, texts)]))


def overlap(texts: Iterable[str], pool: UInt64[np.ndarray, " n"]) -> float:
    """Share of the 13-grams of ``texts`` (counted with repeats) that are in ``pool`` (``gram_pool``); 0.0 where ``texts`` have none."""
    asked = np.concatenate([np.zeros(0, np.uint64), *map(grams, texts)])
    return float(np.isin(asked, pool).mean()) if len(asked) else 0.0


def near_duplicate_groups(texts: Sequence[str], share: float = 0.3) -> Int32[np.ndarray, " n"]:
    """A group number per text, equal for texts joined by a chain of near-duplicates.

    Two texts are near-duplicates when they share more than ``share`` of the distinct 13-grams of the one that has fewer. The number
    is the index of the group's first text.
    """
    step = np.uint64(1 + sum(map(len, texts)) // _FULL)
    hashes, owners = [], []
    sizes = np.zeros(len(texts), np.int64)
    for i, text in enumerate(texts):
        own = np.unique(grams(text))
        own = own[own % step == 0] if len(own) > 64 else own
        sizes[i] = len(own)
        hashes.append(own)
        owners.append(np.full(len(own), i, np.int32))
    parent = np.arange(len(texts), dtype=np.int32)
    if not texts:
        return parent
    left, right = _pairs_sharing(np.concatenate(hashes), np.concatenate(owners))
    pairs, counts = np.unique(left.astype(np.int64) * len(texts) + right, return_counts=True)
    a, b = pairs // len(texts), pairs % len(texts)
    close = counts > share * np.minimum(sizes[a], sizes[b])

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = int(parent[i])
        return i

    for i, j in zip(a[close].tolist(), b[close].tolist(), strict=True):
        x, y = root(i), root(j)
        parent[max(x, y)] = min(x, y)
    return np.asarray([root(i) for i in range(len(texts))], np.int32)


def _pairs_sharing(hashes: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs (i < j) of owners, once for every hash that both have."""
    order = np.lexsort((owners, hashes))
    hashes, owners = hashes[order], owners[order]
    starts = np.flatnonzero(np.r_[True, hashes[1:] != hashes[:-1]]) if len(hashes) else np.zeros(0, np.int64)
    lengths = np.diff(np.r_[starts, len(hashes)])
    rank = np.arange(len(hashes)) - np.repeat(starts, lengths)  # place of an entry among the owners of its hash
    first = np.repeat(starts, lengths)
    lefts, rights = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)]
    for k in range(min(int(lengths.max(initial=1)) - 1, _CROWD)):
        later = np.flatnonzero(rank > k)
        lefts.append(owners[first[later] + k])
        rights.append(owners[later])
    return np.concatenate(lefts), np.concatenate(rights)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: spreads every bit over the whole word."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
