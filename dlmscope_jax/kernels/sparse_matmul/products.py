"""The primitives of sparse codes and the choice among their implementations.

A row-sparse code is values and indices [B, k], a flat-sparse one M triples (value, row, latent); a dictionary stores one latent a row,
[N, D]. All primitives add in float32, whatever the dtype of the dictionary.

- ``combine``, ``combine_flat``: a code times a dictionary, [B, D]
- ``dots``, ``dots_flat``: rows [B, D] against the chosen rows of the dictionary, one number for each place of the code
- ``outer``, ``outer_flat``: a code, transposed, times rows [B, D]: [N, D]
- ``sums``: a code, transposed, times ones: [N]

Implementations: ``reference`` (dense products), ``gather`` (XLA loops), ``segments`` and ``levels`` (``gather``, but pairs sorted by latent
where that one scatters; the first adds in a fixed order everywhere, the second is made for caches), ``pallas_tpu``, ``pallas_gpu``.
README.md has the rule of choice and what it rests on.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

from jaxtyping import Array, Float, Int

from dlmscope_jax.kernels import dispatch
from dlmscope_jax.kernels.dispatch import Implementation, Problem

from . import gather, levels, reference, segments

# A dense product does N / k times the arithmetic of a sparse one; from this ratio on the sparse one is faster (README.md).
_SPARSE_FROM = {"cpu": 8, "tpu": 256, "cuda": 256}
_BEYOND_CACHE = 2**23  # elements of a sum by latent, 32 MB, from which on scattered additions reach memory each time (README.md)


def _pallas(op: str, name: str) -> Implementation:
    """The function ``op`` of the module ``name``, which is imported when it is called, or asked what it refuses."""

    def module() -> ModuleType:
        return import_module(f"{__package__}.{name}")

    def run(*args: Array, **static: int) -> Array:
        return getattr(module(), op)(*args, **static)

    return Implementation(run, lambda problem, platform: module().refuses(problem, platform))


def _table(op: str, segments_form: Callable[..., Array], levels_form: Callable[..., Array]) -> dict[str, Implementation]:
    runs = {"reference": getattr(reference, op), "gather": getattr(gather, op), "segments": segments_form, "levels": levels_form}
    return {name: Implementation(run) for name, run in runs.items()} | {name: _pallas(op, name) for name in ("pallas_tpu", "pallas_gpu")}


COMBINE = _table("combine", gather.combine, gather.combine)
DOTS = _table("dots", gather.dots, gather.dots)
OUTER = _table("outer", segments.outer, levels.outer)
COMBINE_FLAT = _table("combine_flat", segments.combine_flat, levels.combine_flat)
DOTS_FLAT = _table("dots_flat", gather.dots_flat, gather.dots_flat)
SUMS = {"gather": Implementation(gather.sums_flat), "segments": Implementation(segments.sums_flat)}


def sparse_wins(problem: Problem, platform: str) -> bool:
    """Whether a sparse product is taken to be faster than a dense one: the balance rule."""
    return problem.width >= problem.k * _SPARSE_FROM[platform]


def _rows_rule(problem: Problem, platform: str) -> str:
    return "gather" if sparse_wins(problem, platform) else "reference"


def _outer_rule(problem: Problem, platform: str) -> str:
    if not sparse_wins(problem, platform):
        return "reference"
    if platform != "cpu":
        return "segments"
    return "levels" if problem.width * problem.depth >= _BEYOND_CACHE else "gather"


def _combine_flat_rule(problem: Problem, platform: str) -> str:
    if not sparse_wins(problem, platform):
        return "reference"
    return "gather" if platform == "cpu" else "segments"


def _sums_rule(problem: Problem, platform: str) -> str:
    return "gather" if platform == "cpu" else "segments"


def combine(
    values: Float[Array, "B k"], indices: Int[Array, "B k"], weight: Float[Array, "N D"], implementation: str | None = None
) -> Float[Array, "B D"]:
    """``out[b] = sum_j values[b, j] * weight[indices[b, j]]``; an index may occur twice in a row."""
    problem = Problem(*_sizes(weight.shape, indices), weight.dtype)
    return dispatch.run("combine", COMBINE, _rows_rule, problem, implementation, values, indices, weight)


def dots(
    rows: Float[Array, "B D"], indices: Int[Array, "B k"], weight: Float[Array, "N D"], implementation: str | None = None
) -> Float[Array, "B k"]:
    """``out[b, j] = <rows[b], weight[indices[b, j]]>``."""
    problem = Problem(*_sizes(weight.shape, indices), weight.dtype)
    return dispatch.run("dots", DOTS, _rows_rule, problem, implementation, rows, indices, weight)


def outer(
    values: Float[Array, "B k"], indices: Int[Array, "B k"], rows: Float[Array, "B D"], width: int, implementation: str | None = None
) -> Float[Array, "N D"]:
    """``out[n] = sum over (b, j) with indices[b, j] = n of values[b, j] * rows[b]``; N is ``width``."""
    problem = Problem(*_sizes((width, rows.shape[1]), indices), rows.dtype)
    return dispatch.run("outer", OUTER, _outer_rule, problem, implementation, values, indices, rows, width=width)


def combine_flat(
    values: Float[Array, " M"],
    rows: Int[Array, " M"],
    latents: Int[Array, " M"],
    weight: Float[Array, "N D"],
    n_rows: int,
    implementation: str | None = None,
) -> Float[Array, "B D"]:
    """``out[b] = sum over m with rows[m] = b of values[m] * weight[latents[m]]``; B is ``n_rows``."""
    problem = flat_problem(n_rows, weight.shape[0], weight, values)
    return dispatch.run(
        "combine_flat", COMBINE_FLAT, _combine_flat_rule, problem, implementation, values, rows, latents, weight, n_rows=n_rows
    )


def outer_flat(
    values: Float[Array, " M"],
    rows: Int[Array, " M"],
    latents: Int[Array, " M"],
    table: Float[Array, "B D"],
    width: int,
    implementation: str | None = None,
) -> Float[Array, "N D"]:
    """``combine_flat`` with rows and latents exchanged: ``out[n] = sum over m with latents[m] = n of values[m] * table[rows[m]]``."""
    problem = flat_problem(table.shape[0], width, table, values)
    args = (values, latents, rows, table)
    return dispatch.run("combine_flat", COMBINE_FLAT, _outer_rule, problem, implementation, *args, n_rows=width)


def dots_flat(
    left: Float[Array, "B D"],
    rows: Int[Array, " M"],
    latents: Int[Array, " M"],
    weight: Float[Array, "N D"],
    implementation: str | None = None,
) -> Float[Array, " M"]:
    """``out[m] = <left[rows[m]], weight[latents[m]]>``."""
    problem = flat_problem(left.shape[0], weight.shape[0], weight, rows)
    return dispatch.run("dots_flat", DOTS_FLAT, _rows_rule, problem, implementation, left, rows, latents, weight)


def sums(values: Float[Array, " M"], latents: Int[Array, " M"], width: int) -> Float[Array, " N"]:
    """``out[n] = sum over m with latents[m] = n of values[m]``, in a fixed order."""
    problem = Problem(values.shape[0], width, 1, 0, values.dtype)
    return dispatch.run("sums", SUMS, _sums_rule, problem, None, values, latents, width=width)


def _sizes(weight: tuple[int, ...], indices: Array) -> tuple[int, int, int, int]:
    """B, N, k and D."""
    return indices.shape[0], weight[0], indices.shape[1], weight[1]


def flat_problem(n_rows: int, width: int, table: Array, pairs: Array) -> Problem:
    """A flat code of ``n_rows`` rows and ``width`` latents; k is its pairs divided by its rows, rounded up."""
    return Problem(n_rows, width, -(-pairs.shape[0] // max(1, n_rows)), table.shape[1], table.dtype)
