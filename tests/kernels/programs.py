"""What a compiled program moves between devices and what it sorts, read from its optimised HLO text (``compiled.as_text()``).

A search for the shape of an all-gather is not enough: a permute, a sum of arrays padded with zeros, or a small collective in a
loop moves as much. So every collective is found, in every computation that the entry reaches, with the bytes of its operands
and how often the loops around it run it.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

MOVERS = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all", "reduce-scatter", "send",
)  # fmt: skip

_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=\s]*)\]")
_BITS = re.compile(r"(?:bf|f|s|u|c)(\d+)")
_NAME = re.compile(r"%([\w.\-]+)")
_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s+\(.*->.*\{\s*$")
_RESULT = re.compile(r"^\s+(?:ROOT\s+)?%?([\w.\-]+) = ")
_CALLED = re.compile(r"\b(\w+)=(?:%([\w.\-]+)|\{(%[^}]*)\})")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


class Collective(NamedTuple):
    """One collective: its operation without ``-start``, the bytes of its operands on one device, how often it runs."""

    op: str
    operand_bytes: int
    trips: int


class Sort(NamedTuple):
    """One sort or top-k: how many entries are sorted against each other, and the entries of the array in all."""

    length: int
    entries: int


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: what it gives (its type as text), what it does, to what, and the rest of the line."""

    result: str
    op: str
    operands: str
    attributes: str

    @cached_property
    def called(self) -> tuple[tuple[str, str], ...]:
        """(attribute, computation) for each computation that it names; the end of an asynchronous pair calls nothing."""
        if self.op.endswith(("-done", "-update")):
            return ()
        plain = re.sub(r'"[^"]*"', "", self.attributes)
        return tuple((m[1], name) for m in _CALLED.finditer(plain) if m[1] != "predecessors" for name in _NAME.findall(m[0]))


def collectives(text: str) -> list[Collective]:
    """Every collective that the entry reaches, in no particular order; its operands are counted once where it has two halves.

    Raises:
      ValueError: a collective in a loop whose trip count the compiler did not know, or a type of unknown size.
    """
    entry, computations = _parsed(text)
    moves = {}

    def has_any(name: str) -> bool:
        if name not in moves:
            moves[name] = False
            lines = computations.get(name, {}).values()
            moves[name] = any(_mover(i) or any(has_any(inner) for _, inner in i.called) for i in lines)
        return moves[name]

    def walk(name: str, trips: int) -> Iterator[Collective]:
        for line in computations.get(name, {}).values():
            if op := _mover(line):
                yield Collective(op, _bytes(_operand_types(line, computations[name])), trips)
            for role, inner in line.called:
                if not has_any(inner):
                    continue
                times = trips
                if line.op == "while":
                    known = _trips(line, computations, name)
                    if known is None:
                        raise ValueError(f"a loop of unknown trip count holds a collective (its {role} is {inner})")
                    times *= known + (role == "condition")
                yield from walk(inner, times)

    return list(walk(entry, 1))


def _trips(line: Instruction, computations: dict[str, dict[str, Instruction]], around: str) -> int | None:
    """How often a loop runs: as the compiler says, or as it counts, by ones from one constant to below another (TPU); None: not known."""
    if known := _TRIPS.search(line.attributes):
        return int(known[1])
    parts = dict(line.called)
    condition, body = computations[parts["condition"]], computations[parts["body"]]
    ends = [i for i in condition.values() if i.op == "compare" and "direction=LT" in i.attributes]
    if len(ends) != 1:
        return None
    counter, end = (_constant_or_place(name, condition) for name in _NAME.findall(ends[0].operands))
    if not isinstance(counter, str) or not isinstance(end, int):
        return None
    place = int(counter)
    begun, ended = _NAME.findall(line.operands)[0], list(body)[-1]
    if computations[around][begun].op != "tuple" or body[ended].op != "tuple":
        return None
    first = _constant_or_place(_element(begun, place, computations[around]), computations[around])
    following = body[_element(ended, place, body)]
    added = [_constant_or_place(name, body) for name in _NAME.findall(following.operands)]
    by_one = following.op == "add" and sorted(map(repr, added)) == sorted(map(repr, [counter, 1]))
    return end - first if by_one and isinstance(first, int) else None


def _element(of: str, place: int, lines: dict[str, Instruction]) -> str:
    """The name of an element of a tuple that is made here."""
    return _NAME.findall(lines[of].operands)[place]


def _constant_or_place(name: str, lines: dict[str, Instruction]) -> int | str | None:
    """A constant's number, copies looked through; of an element of the parameter its place, as text; None: something else."""
    while lines[name].op == "copy":
        name = _NAME.findall(lines[name].operands)[0]
    line = lines[name]
    if line.op == "constant" and line.operands.isdecimal():
        return int(line.operands)
    index = re.search(r"index=(\d+)", line.attributes)
    return index[1] if line.op == "get-tuple-element" and index else None


def moved(text: str) -> int:
    """Bytes that one device gives to collectives in one run of the program."""
    return sum(c.operand_bytes * c.trips for c in collectives(text))


def sorts(text: str) -> list[Sort]:
    """Every sort and every top-k, an operation of its own or a library's."""
    found = []
    for lines in _parsed(text)[1].values():
        for line in lines.values():
            target = re.search(r'custom_call_target="([^"]*)"', line.attributes)
            if line.op == "sort":
                along = int(re.search(r"dimensions=\{(\d+)\}", line.attributes)[1])
            elif line.op == "topk" or line.op == "custom-call" and re.search("topk|sort", target[1], re.IGNORECASE):
                along = -1
            else:
                continue
            dims = _dims(_ARRAY.search(_operand_types(line, lines))[2])
            found.append(Sort(dims[along], math.prod(dims)))
    return found


def _mover(line: Instruction) -> str | None:
    """The collective that it begins, unless every device is alone in its group."""
    op = line.op.removesuffix("-start")
    return op if op in MOVERS and not _alone(line.attributes) else None


def _alone(attributes: str) -> bool:
    """Whether groups are of one device: as lists of devices, as a grid [groups, devices], or as axes of a mesh (jax 0.11.2)."""
    if listed := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes):
        return all(len(set(group.split(","))) == 1 for group in re.findall(r"\{([\d,]+)\}", listed[1]))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes):
        sizes = dict(re.findall(r"'([^']*)'=(\d+)", mesh[1]))
        return all(sizes.get(axis.strip("'")) == "1" for axis in mesh[2].split(","))
    return bool(re.search(r"replica_groups=\[\d+,1\]<=", attributes))


def _parsed(text: str) -> tuple[str, dict[str, dict[str, Instruction]]]:
    """The entry's name, and computations as instructions by name."""
    entry, computations, current = "", {}, {}
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations[header[2]] = {}
            entry = header[2] if header[1] else entry
        elif result := _RESULT.match(line):
            current[result[1]] = _instruction(line[result.end() :])
    if not entry:
        raise ValueError("no entry: this is not the text of a compiled program")
    return entry, computations


def _instruction(line: str) -> Instruction:
    """``TYPE op(OPERANDS), ATTRIBUTES``; the type may be a tuple, and layouts hold parentheses."""
    end = _closing(line, 0) if line.startswith("(") else line.index(" ")
    opening = line.index("(", end)
    closing = _closing(line, opening)
    return Instruction(line[:end], line[end:opening].strip(), line[opening + 1 : closing - 1], line[closing:])


def _closing(text: str, start: int) -> int:
    """Just after the parenthesis that closes the one at ``start``."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    raise ValueError(f"no closing parenthesis: {text[start : start + 80]}")


def _operand_types(line: Instruction, computation: dict[str, Instruction]) -> str:
    """The types of the operands, from where they are made: not every compiler repeats them."""
    return ", ".join(computation[name].result for name in _NAME.findall(line.operands))


def _dims(dims: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", dims)]


def _bytes(types: str) -> int:
    return sum(-(-math.prod(_dims(dims)) * _bits(dtype) // 8) for dtype, dims in _ARRAY.findall(types))


def _bits(dtype: str) -> int:
    if dtype in ("token", "opaque"):
        return 0
    if dtype == "pred":
        return 8
    if bits := _BITS.match(dtype):
        return int(bits[1])
    raise ValueError(f"a type of unknown size: {dtype}")
