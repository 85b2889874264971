"""13-grams, overlap and near-duplicate groups against plain Python sets."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlmscope_jax.data import duplicates
from dlmscope_jax.data.duplicates import gram_pool, grams, near_duplicate_groups, overlap


def reference_grams(text: str) -> list[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return [tuple(words[i : i + 13]) for i in range(max(len(words) - 12, 1))] if words else []


def reference_groups(texts: list[str]) -> list[int]:
    sets = [set(reference_grams(t)) for t in texts]
    group = list(range(len(texts)))
    for i in range(len(texts)):
        for j in range(i):
            if len(sets[i] & sets[j]) > 0.3 * min(len(sets[i]), len(sets[j])):
                old, new = max(group[i], group[j]), min(group[i], group[j])
                group = [new if g == old else g for g in group]
    return group


def words(rng: np.random.Generator, n: int) -> list[str]:
    return [f"w{i}" for i in rng.integers(0, 5000, n)]


def test_grams_are_equal_exactly_where_the_words_are():
    text = "The quick brown fox; " * 9 + "jumps_over 12 lazy dogs"
    mine, reference = grams(text), reference_grams(text)
    assert len(mine) == len(reference)
    assert [(mine == h).nonzero()[0].tolist() for h in mine] == [[j for j, r in enumerate(reference) if r == s] for s in reference]
    assert np.array_equal(grams(text), grams(text.upper().replace(";", " --")))
    assert len(grams(" .;!")) == 0
    assert grams("a b c") != grams("c b a")


def test_overlap_is_the_share_with_repeats():
    seen = " ".join(f"s{i}" for i in range(40))
    fresh = " ".join(f"f{i}" for i in range(40))
    assert overlap([seen], gram_pool([fresh])) == 0.0
    assert overlap([seen, fresh, fresh], gram_pool([seen])) == pytest.approx(1 / 3)
    assert overlap([], gram_pool([seen])) == 0.0 and overlap([seen], gram_pool([])) == 0.0


def test_a_third_shared_is_joined_and_a_quarter_is_not():
    rng = np.random.default_rng(0)
    common, a, b = words(rng, 112), words(rng, 400), words(rng, 400)  # 112 words hold 100 grams

    def share(n_own: int) -> list[int]:
        return near_duplicate_groups([" ".join(common + a[:n_own]), " ".join(common + b[: n_own + 50])]).tolist()

    assert share(220) == [0, 0]  # 100 of 320 grams
    assert share(300) == [0, 1]  # 100 of 400


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 12))
def test_groups_agree_with_sets(seed, n):
    rng = np.random.default_rng(seed)
    sources = [words(rng, 120) for _ in range(3)]
    texts = []
    for _ in range(n):
        cuts = [s[a : a + int(rng.integers(0, 90))] for s in sources for a in [int(rng.integers(0, 60))] if rng.integers(2)]
        texts.append(" ".join(w for cut in cuts for w in cut) + " " + " ".join(words(rng, int(rng.integers(0, 60)))))
    assert near_duplicate_groups(texts).tolist() == reference_groups(texts)


def test_many_copies_cost_little_and_stay_together():
    rng = np.random.default_rng(1)
    licence = words(rng, 60)
    texts = [" ".join(licence + words(rng, 40)) for _ in range(300)] + [" ".join(words(rng, 100)) for _ in range(20)]
    groups = near_duplicate_groups(texts).tolist()
    assert groups == [0] * 300 + list(range(300, 320))


def test_large_corpora_are_sampled(monkeypatch):
    rng = np.random.default_rng(2)
    one, other = words(rng, 3000), words(rng, 3000)
    texts = [" ".join(one), " ".join(one[:1500] + other), " ".join(other[1000:2900])]
    monkeypatch.setattr(duplicates, "_FULL", len("".join(texts)) // 4)
    assert near_duplicate_groups(texts).tolist() == [0, 0, 0]
    assert near_duplicate_groups([texts[0], " ".join(words(rng, 3000))]).tolist() == [0, 1]
