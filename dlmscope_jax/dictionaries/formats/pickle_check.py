"""A pickle's instructions, looked at before any of them is followed.

Four things in it could do harm although every name that it asks for is harmless: an instruction that torch does not write, a memo
index that makes the unpickler allocate memory for all those below it, a dictionary key whose hash takes for ever (sixty tuples, each of
which holds the one before it twice), and millions of instructions, most of which make an object of a hundred times their length. Keys must
be text or numbers; for that the stack is followed, without values.
"""

import pickletools

from dlmscope_jax.errors import UserError

_OPCODES = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT "
    "BINUNICODE SHORT_BINUNICODE EMPTY_LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT SETITEM SETITEMS "
    "BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD NEWOBJ BINPERSID".split()
)
_PLAIN = frozenset("NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE".split())
_MARK = "mark"
_MOST = 2**18  # instructions; a tensor takes about forty


def check_opcodes(data: bytes, also: frozenset[str] = frozenset()) -> int:
    """Refuses a pickle with other instructions than torch's and those in ``also``; returns where it ends.

    Raises:
      UserError: another instruction, too many of them, a memo index or a number out of all proportion, a key that is neither text nor a
        number, an empty stack.
      ValueError: instructions that are cut short.
    """
    stack: list[bool | str] = []  # whether each value is text or a number
    memo: dict[int, bool | str] = {}
    position = 0
    for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):  # noqa: B007  # the last position is STOP's
        name = opcode.name
        if count >= _MOST:
            raise UserError(f"has more than {_MOST} instructions, which no file of tensors needs; it was not run")
        if name not in _OPCODES and name not in also:
            raise UserError(f"uses the pickle instruction {name}, which torch does not write; it was not run")
        if name == "LONG1" and argument.bit_length() > 128:
            raise UserError("holds a whole number that is longer than any of torch's; it was not run")
        if name in ("BINPUT", "LONG_BINPUT") and argument > len(data):
            raise UserError("uses an impossible memo index; it was not run")
        if name in ("BINPUT", "LONG_BINPUT", "MEMOIZE"):
            memo[len(memo) if argument is None else argument] = _taken(stack, 1)[0]
            stack.append(memo[len(memo) - 1 if argument is None else argument])
            continue
        items: list[bool | str] = []
        if pickletools.markobject in opcode.stack_before:
            if _MARK not in stack:
                raise UserError("takes more from its stack than there is; it was not run")
            items = _taken(stack, stack[::-1].index(_MARK) + 1)[1:]
            below = _taken(stack, opcode.stack_before.index(pickletools.markobject))
        else:
            below = _taken(stack, len(opcode.stack_before))
        keys = below[1:2] if name == "SETITEM" else items[::2] if name == "SETITEMS" else []
        if not all(key is True for key in keys):
            raise UserError("has a dictionary with a key that is neither text nor a number; it was not run")
        if name in ("BINGET", "LONG_BINGET"):
            stack.append(memo.get(argument, False))
        elif name == "DUP":
            stack += below * 2
        else:
            stack += [_MARK if name == "MARK" else name in _PLAIN] * len(opcode.stack_after)
    return position + 1


def _taken(stack: list[bool | str], count: int) -> list[bool | str]:
    """The last ``count`` entries, which leave the stack."""
    if count > len(stack):
        raise UserError("takes more from its stack than there is; it was not run")
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return taken
