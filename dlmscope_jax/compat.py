"""The only file that asks which jax this is. Two are supported, 0.10.2 and 0.11.2; what differs between them ends here.

Pallas' Triton backend is chosen by its own compiler parameters: without any, ``pallas_call`` means another backend in each of the two.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax

# 0.11.2 says so when a kernel is lowered. The Mosaic backend, which it recommends, has no gather, no scan and no indexed store.
_TRITON_DEPRECATION = "The Pallas Triton backend is deprecated"


def triton_params(warps: int, stages: int) -> Any:
    """``compiler_params`` of a ``pallas_call`` that Triton compiles: warps of a program, stages of its pipelined loops.

    The warning that the backend is deprecated is not shown from here on: it can be acted on in this file alone.
    """
    from jax.experimental.pallas import triton

    warnings.filterwarnings("ignore", message=_TRITON_DEPRECATION, category=DeprecationWarning)
    return triton.CompilerParams(num_warps=warps, num_stages=stages)


def varying(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes that one of the arrays varies over, inside ``shard_map``; none outside of it."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def result(shape: tuple[int, ...], dtype: Any, *like: jax.Array) -> jax.ShapeDtypeStruct:
    """``out_shape`` of a ``pallas_call`` whose result varies over the mesh axes that one of ``like`` varies over."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType(varying=varying(*like)))


def lower_for(platform: str, fn: Callable, *args: Any) -> jax.stages.Lowered:
    """``fn(*args)`` lowered for ``"cpu"``, ``"tpu"`` or ``"cuda"``, none of which need be here; arguments may be shapes.

    Nothing is compiled. To lower a Triton kernel 0.11.2 asks for a device: where there is none it is told of an NVIDIA H200, in a
    mesh of its own, so that such a kernel inside a ``shard_map`` over another mesh lowers on 0.10.2 only.
    """
    fn = fn if hasattr(fn, "trace") else jax.jit(fn)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_TRITON_DEPRECATION, category=DeprecationWarning)
        try:
            return fn.trace(*args).lower(lowering_platforms=(platform,))
        except RuntimeError as error:
            if "AbstractDevice" not in str(error):
                raise
        device = jax.sharding.AbstractDevice("NVIDIA H200", 132, "gpu")
        mesh = jax.sharding.AbstractMesh((1,), ("gpu",), axis_types=(jax.sharding.AxisType.Auto,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            return fn.trace(*args).lower(lowering_platforms=(platform,))
