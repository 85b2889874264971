"""Seeded synthetic documents whose right answers are known: key -> value episodes, increasing ranges, assignment chains.

A document is a pure function of (seed, side, index). Values are held out between sides (key-value pairs, range starts,
whole chains), and so are templates: dev and test documents use a template of their own half of the time and a training
template otherwise (``template_seen`` tells them apart). The format is fixed: the pocket models are trained on it.
"""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from .documents import SIDES, Document, Side

Task = Literal["pairs", "range", "chain"]

_KEYS = ("fox owl cat dog cow pig hen bee ant bat rat elk cup pen hat box bag map key car bus van jet oak fig yam tea jam egg pie").split()
_VALUES = ("red blue green black white gold pink gray iron wood glass paper north south east west big small hot cold "
           "fast slow old new wet dry left right up down").split()  # fmt: skip
_NOUNS = "war trip game talk show test work race siege strike voyage tour".split()
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@dataclass(frozen=True)
class Answer:
    """One span of a synthetic document that its other text determines.

    ``text[start:stop]`` (character offsets) is the answer; any string of ``accepted`` would be right. ``depends_on`` are indices
    of the answers of the same document that it is computed from; ``label`` is the key, the range's start or the variable.
    """

    start: int
    stop: int
    accepted: tuple[str, ...]
    label: str
    depends_on: tuple[int, ...] = ()


@dataclass(frozen=True)
class SyntheticDocument(Document):
    """A document with its ground truth. ``answers`` are in text order; ``template_seen``: training documents use this template too."""

    task: Task
    template: str
    template_seen: bool
    answers: tuple[Answer, ...]

    @property
    def dependency_order(self) -> tuple[int, ...]:
        """Indices into ``answers`` sorted so that every answer comes after those it depends on (unique for a chain)."""
        done: list[int] = []
        while len(done) < len(self.answers):
            done += [i for i, a in enumerate(self.answers) if i not in done and all(j in done for j in a.depends_on)][:1]
        return tuple(done)


def synthetic_documents(side: Side, seed: int = 0, start: int = 0) -> Iterator[SyntheticDocument]:
    """Endless documents of one side, from index ``start``: a quarter pairs, a quarter ranges, half chains."""
    for index in itertools.count(start):
        yield synthetic_document(side, seed, index)


def synthetic_document(side: Side, seed: int, index: int) -> SyntheticDocument:
    """Document ``index`` of a side: a pure function of its arguments."""
    rng = np.random.default_rng([seed, SIDES.index(side), index])
    task: Task = ("pairs", "range", "chain", "chain")[rng.integers(4)]
    seen, held_dev, held_test = _TEMPLATES[task]
    template_seen = side == "train" or bool(rng.integers(2))
    template = seen[rng.integers(len(seen))] if template_seen else {"dev": held_dev, "test": held_test}[side]
    text, answers = {"pairs": _pairs, "range": _range, "chain": _chain}[task](rng, side, template)
    return SyntheticDocument(
        name=f"synthetic:{side}:{seed}:{index}",
        text=text,
        side=side,
        task=task,
        template=template,
        template_seen=template_seen,
        answers=answers,
    )


# Templates per task: those of training, dev's own, test's own. A name describes the line's shape.
_TEMPLATES: dict[Task, tuple[tuple[str, ...], str, str]] = {
    "pairs": (("{k} -> {v}\n", "{k}: {v}, ", "The {k} is {v}. ", "d['{k}'] = '{v}'\n"), "{k} = {v}; ", "{k} has {v} | "),
    "range": (
        ("from {a} to {b}\n", "The {n} lasted from {a} to {b}. ", "range({a}, {b})\n", "pages {a}-{b}, "),
        "between {a} and {b}; ",
        "{a} up to {b}\n",
    ),
    "chain": (
        (
            "{x}={e}; |then |{x}={v}, |.\n",
            "{x} = {e}\n||assert {x} == {v}\n|",
            "let {x}={e}. |so |{x} is {v}. |\n",
            ">>> {x}={e}\n|>>> show()\n|{x}: {v}\n|",
        ),
        "given {x}={e}, |get |{x}:{v} |\n",
        "set {x} to {e}\n|now |{x} has {v}, |.\n",
    ),
}


class _Text:
    """A text under construction that remembers where its answers went."""

    def __init__(self) -> None:
        self.text = ""
        self.answers: list[Answer] = []

    def add(self, template: str, **words: str) -> None:
        """Append a filled template."""
        self.text += template.format(**words)

    def ask(self, template: str, slot: str, accepted: tuple[str, ...], label: str, depends_on: tuple[int, ...] = (), **words: str) -> None:
        """Append a filled template whose ``slot`` ends with an answer, the first of ``accepted``."""
        before, _, after = template.partition("{" + slot + "}")
        self.add(before + "{" + slot + "}", **words)
        stop = len(self.text)
        self.answers.append(Answer(stop - len(accepted[0]), stop, accepted, label, depends_on))
        self.add(after, **words)


def _pairs(rng: np.random.Generator, side: Side, template: str) -> tuple[str, tuple[Answer, ...]]:
    """A fresh mapping of 3-5 keys, shown once, then asked for 4-7 times; each repeat is an answer."""
    n = int(rng.integers(3, 6))
    keys = rng.permutation(len(_KEYS))[:n]
    pairs = [(_KEYS[i], _VALUES[rng.choice(_side_values(int(i), side))]) for i in keys]
    out = _Text()
    for k, v in pairs:
        out.add(template, k=k, v=v)
    for _ in range(int(rng.integers(4, 8))):
        k, v = pairs[rng.integers(n)]
        out.ask(template, "v", (v,), label=k, k=k, v=v)
    return out.text.rstrip(" ") + "\n" * (not out.text.endswith("\n")), tuple(out.answers)


def _side_values(key: int, side: Side) -> list[int]:
    """Values that a key may take on a side: a Latin pattern, so every key and every value occurs on every side, no pair on two."""
    return [v for v in range(len(_VALUES)) if _bucket_side((3 * key + v) % 10) == side]


def _range(rng: np.random.Generator, side: Side, template: str) -> tuple[str, tuple[Answer, ...]]:
    """4-6 increasing ranges whose ends share the tens digit; the end's last digit is the answer (any larger digit is right)."""
    starts = [10 * t + u for t in range(1, 10) for u in range(9) if _bucket_side((3 * t + u) % 10) == side]
    out = _Text()
    for i in rng.permutation(len(starts))[: int(rng.integers(4, 7))]:
        a = starts[i]
        b = int(rng.integers(a + 1, a - a % 10 + 10))
        accepted = (str(b % 10), *(str(d) for d in range(a % 10 + 1, 10) if d != b % 10))
        out.ask(template, "b", accepted, label=str(a), a=str(a), b=str(b), n=_NOUNS[rng.integers(len(_NOUNS))])
    return out.text.rstrip(" ") + "\n" * (not out.text.endswith("\n")), tuple(out.answers)


def _chain(rng: np.random.Generator, side: Side, template: str) -> tuple[str, tuple[Answer, ...]]:
    """A chain of 3-5 one-digit variables, each the one before plus or minus a number; the values are then listed in random order.

    The definitions are shuffled half of the time, so that the dependency order is not the reading order.
    """
    n = int(rng.integers(3, 6))
    while True:
        values = [int(v) for v in rng.integers(0, 10, n)]
        moves = [b - a for a, b in itertools.pairwise(values)]
        signature = f"{values[0]}:{moves}"
        if all(moves) and _bucket_side(int(hashlib.sha256(signature.encode()).hexdigest(), 16) % 10) == side:
            break
    names = [_LETTERS[i] for i in rng.permutation(26)[:n]]
    expressions = [str(values[0]), *(f"{names[i]}{'+' if m > 0 else '-'}{abs(m)}" for i, m in enumerate(moves))]
    define, middle, tell, end = template.split("|")
    out = _Text()
    for i in rng.permutation(n) if rng.integers(2) else range(n):
        out.add(define, x=names[i], e=expressions[i])
    out.add(middle)
    listed = [int(i) for i in rng.permutation(n)]
    for i in listed:
        value, before = str(values[i]), (listed.index(i - 1),) if i else ()
        out.ask(tell, "v", (value,), label=names[i], depends_on=before, x=names[i], v=value)
    return out.text.rstrip(", ") + end, tuple(out.answers)


def _bucket_side(bucket: int) -> Side:
    return "train" if bucket < 8 else "dev" if bucket == 8 else "test"
