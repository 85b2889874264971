"""The synthetic documents: their answers are right, what is held out is held out, and their format stays as it is."""

import hashlib
import re
from itertools import islice, pairwise

import pytest

from dlmscope_jax.data.documents import SIDES
from dlmscope_jax.data.duplicates import gram_pool, overlap
from dlmscope_jax.data.synthetic import SyntheticDocument, synthetic_document, synthetic_documents

N = 1500


@pytest.fixture(scope="module")
def documents() -> dict[str, list[SyntheticDocument]]:
    return {side: list(islice(synthetic_documents(side), N)) for side in SIDES}


def of_task(documents: list[SyntheticDocument], task: str) -> list[SyntheticDocument]:
    return [d for d in documents if d.task == task]


def test_the_format_is_pinned(documents):
    """The shipped models are trained on these very texts: a change here needs new models."""
    digests = {s: hashlib.sha256("\0".join(d.text for d in documents[s][:300]).encode()).hexdigest()[:16] for s in SIDES}
    assert digests == {"train": "03f45cafbb1619e9", "dev": "2166cbaef63bddb9", "test": "8ca164c2b1c1c345"}


def test_a_document_is_a_function_of_its_index():
    assert synthetic_document("dev", 3, 17) == next(synthetic_documents("dev", seed=3, start=17))
    assert len({synthetic_document(side, seed, i).text for side in SIDES for seed in (0, 1) for i in range(20)}) == 120


def test_every_answer_is_where_it_is_said_to_be(documents):
    for d in documents["train"] + documents["dev"] + documents["test"]:
        assert d.answers and [a.start for a in d.answers] == sorted(a.start for a in d.answers)
        for a in d.answers:
            assert d.text[a.start : a.stop] == a.accepted[0] and len(set(a.accepted)) == len(a.accepted)
        assert d.text.endswith("\n") and d.text.isascii() and len(d.text) < 260


def test_tasks_come_in_their_shares(documents):
    for side in SIDES:
        shares = [len(of_task(documents[side], t)) / N for t in ("pairs", "range", "chain")]
        assert shares == pytest.approx([0.25, 0.25, 0.5], abs=0.04)


def test_pairs_answers_repeat_what_was_shown(documents):
    for d in of_task(documents["train"] + documents["test"], "pairs"):
        for a in d.answers:
            separators = re.escape(d.template.split("{k}")[1].split("{v}")[0])
            shown = re.findall(rf"\b{a.label}\b{separators}(\w+)", d.text[: a.start])
            assert shown and set(shown) == set(a.accepted)
        assert len({a.label for a in d.answers}) <= 5


def test_range_answers_are_every_larger_digit(documents):
    for d in of_task(documents["train"] + documents["test"], "range"):
        assert 4 <= len(d.answers) <= 6
        for a in d.answers:
            start = int(a.label)
            assert sorted(a.accepted) == [str(u) for u in range(start % 10 + 1, 10)]
            assert re.search(rf"{start}\D+{start // 10}$", d.text[: a.start])  # the tens digit is given, and the same


def solve(d: SyntheticDocument) -> dict[str, tuple[int, int]]:
    """Variable -> (value, depth), from the definitions as they stand in the text."""
    body = d.text[: d.answers[0].start]
    found = re.findall(r"\b(?!to\b)([a-z]) ?(?:=|to) ?(?:([a-z])([+-])(\d)|(\d))", body)
    left = {v: (base, int(op + by)) if base else int(start) for v, base, op, by, start in found}
    known: dict[str, tuple[int, int]] = {}
    while left:
        for v, e in list(left.items()):
            if isinstance(e, int):
                known[v] = (e, 0)
            elif e[0] in known:
                known[v] = (known[e[0]][0] + e[1], known[e[0]][1] + 1)
            else:
                continue
            del left[v]
    return known


def test_chain_answers_solve_the_chain(documents):
    shuffled = 0
    for d in of_task(documents["train"] + documents["dev"] + documents["test"], "chain"):
        first = d.answers[0]
        known = solve(SyntheticDocument(d.name, d.text, d.side, d.task, d.template, d.template_seen, (first,)))
        assert {a.label: int(a.accepted[0]) for a in d.answers} == {v: value for v, (value, _) in known.items() if v in names(d)}
        order = d.dependency_order
        assert sorted(order) == list(range(len(d.answers)))
        assert [known[d.answers[i].label][1] for i in order] == list(range(len(order)))  # depth 0, 1, 2, ...
        assert all(d.answers[b].depends_on == (a,) for a, b in pairwise(order)) and d.answers[order[0]].depends_on == ()
        shuffled += list(order) != sorted(order)
    assert shuffled > N / 3  # values are not listed in the order they depend on each other


def names(d: SyntheticDocument) -> set[str]:
    return {a.label for a in d.answers}


def value_of(d: SyntheticDocument) -> set[str]:
    if d.task == "pairs":
        return {f"{a.label} {a.accepted[0]}" for a in d.answers}
    if d.task == "range":
        return {a.label for a in d.answers}
    return {" ".join(d.answers[i].accepted[0] for i in d.dependency_order)}


def test_values_and_templates_are_held_out(documents):
    for task in ("pairs", "range", "chain"):
        seen = {side: set().union(*map(value_of, of_task(documents[side], task))) for side in SIDES}
        assert all(seen.values())
        assert not seen["train"] & seen["test"] and not seen["train"] & seen["dev"] and not seen["dev"] & seen["test"]
        training = {d.template for d in of_task(documents["train"], task)}
        assert len(training) == 4
        own = []
        for side in ("dev", "test"):
            for d in of_task(documents[side], task):
                assert d.template_seen == (d.template in training)
            new = {d.template for d in of_task(documents[side], task)} - training
            assert len(new) == 1
            own += new
            share = sum(d.template_seen for d in of_task(documents[side], task)) / len(of_task(documents[side], task))
            assert 0.4 < share < 0.6
        assert own[0] != own[1]


def test_little_of_test_is_in_train(documents):
    assert overlap([d.text for d in documents["test"]], gram_pool(d.text for d in documents["train"])) < 0.10
