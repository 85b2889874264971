"""One way to choose among implementations of an operation: by name, or by the platform that the program is lowered for.

A table holds the implementations of an operation; each says of a problem and a platform whether it refuses. A name is
checked against the machine's own platform and works or raises, it is never replaced. Without a name the operation's rule
picks for every platform, and the lowering takes the one that fits: a program that is compiled for a TPU on a machine
without one gets the TPU's choice. What was chosen is written into the program, where ``ran`` reads it.

A program that is divided over several devices calls Pallas kernels inside of ``jax.shard_map``: no compiler can divide them.

Platforms are named as ``jax.lax.platform_dependent`` names them: ``"cpu"``, ``"tpu"``, ``"cuda"``.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dlmscope_jax.compat import lower_for
from dlmscope_jax.errors import UserError

PLATFORMS = ("cpu", "tpu", "cuda")
_SCOPE = re.compile(r"dlmscope\.(\w+\.\w+)")


@dataclass(frozen=True)
class Problem:
    """What is known of a call when it is traced: sizes and dtype.

    Attributes:
      rows: B.
      width: N, the latents or the entries of a row.
      k: entries selected, or places of a code.
      depth: D, 0 where there is none.
      dtype: of the data.
    """

    rows: int
    width: int
    k: int
    depth: int = 0
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))


class Implementation(NamedTuple):
    """A function, and why it cannot do a problem on a platform: a clause after the name ("needs ..."), or None if it can."""

    run: Callable[..., Any]
    refuses: Callable[[Problem, str], str | None] = lambda problem, platform: None


Table = Mapping[str, Implementation]
Default = Callable[[Problem, str], str]


def platform_here() -> str:
    """The platform that a program is lowered for when nobody says otherwise."""
    backend = jax.default_backend()
    return "cuda" if backend == "gpu" else backend


def run(op: str, table: Table, default: Default, problem: Problem, name: str | None, *args: Any, **static: Any) -> Any:
    """Runs the implementation of ``op`` that is named, or the one that ``default`` picks for the platform of the program.

    Args:
      op: the operation's name, for messages and for ``ran``.
      table: its implementations by name; all return the same shapes and dtypes.
      default: the rule ``(problem, platform) -> name``.
      problem: what the rule and the refusals look at.
      name: an implementation, or None for the rule's.
      *args: arrays (or trees of them), handed on.
      **static: what is not an array, handed on by name.

    Raises:
      UserError: a name that is unknown, or refused on this machine's platform.
    """
    if name is not None:
        check(op, table, problem, name)
    chosen = tuple(name or default(problem, platform) for platform in PLATFORMS)
    return _program(op, chosen, tuple(table[one].run for one in chosen), tuple(sorted(static.items())))(*args)


def check(op: str, table: Table, problem: Problem, name: str) -> None:
    """Raises where the implementation called ``name`` is unknown or cannot do the problem on this machine's platform."""
    if name not in table:
        raise UserError(f"{op}: implementation {name!r} is not known: one of {', '.join(table)}")
    platform = platform_here()
    reason = table[name].refuses(problem, platform)
    if reason is not None:
        can = [repr(other) for other in table if table[other].refuses(problem, platform) is None]
        raise UserError(f"{op}: {name!r} {reason}: use {' or '.join(can) or 'another platform'}")


@cache
def _program(op: str, names: tuple[str, ...], runs: tuple[Callable, ...], static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    """The implementations chosen for ``PLATFORMS``. Compiled as one, so that what other platforms would run is traced once a shape."""

    def on(name: str, run: Callable[..., Any], *args: Any) -> Any:
        with jax.named_scope(f"dlmscope.{op}.{name}"):
            return run(*args, **dict(static))

    branches = [partial(on, name, run) for name, run in zip(names, runs, strict=True)]

    def program(*args: Any) -> Any:
        if len(set(names)) == 1:
            return branches[0](*args)
        return jax.lax.platform_dependent(*args, default=branches[0], **dict(zip(PLATFORMS, branches, strict=True)))

    program.__name__ = op
    return jax.jit(program)


def ran(fn: Callable[..., Any], *args: Any, platform: str | None = None) -> set[str]:
    """Which implementations a program holds: ``{"topk.grouped", ...}``, read from the lowered text of ``fn(*args)``.

    Args:
      fn: compiled or not.
      *args: arrays or their shapes and dtypes; nothing is executed.
      platform: what to lower for, None for this machine's.
    """
    return set(_SCOPE.findall(lower_for(platform or platform_here(), jax.jit(fn), *args).as_text(debug_info=True)))
