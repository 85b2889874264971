"""What differs between the two versions of jax: the same source lowers on either, for hardware that is not here."""

import ast
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dlmscope_jax.compat import lower_for, triton_params

PACKAGE = Path(__file__).resolve().parent.parent / "dlmscope_jax"
# what a branch on a version or a feature of jax is written with
VERSION_WORDS = {"__version__", "__version_info__", "version_info"}


def cumulative(x, params=None):
    from jax.experimental import pallas as pl

    def kernel(x_ref, out_ref):
        out_ref[...] = jnp.cumsum(x_ref[...], axis=0)

    return pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), compiler_params=params or triton_params(4, 1))(x)


def test_a_triton_kernel_lowers_without_a_gpu_and_without_a_warning():
    text = lower_for("cuda", cumulative, jax.ShapeDtypeStruct((64,), jnp.float32)).as_text()
    assert "__gpu$xla.gpu.triton" in text and "num_warps = 4" in text and "num_stages = 1" in text
    assert "mosaic" not in text


def test_lowering_hides_the_one_warning_even_where_nothing_else_did():
    with warnings.catch_warnings():
        params = triton_params(4, 1)
    lower_for("cuda", lambda x: cumulative(x, params), jnp.ones(64))


def test_only_the_one_warning_is_hidden():
    triton_params(4, 1)
    warnings.warn("The Pallas Triton backend is deprecated and will be removed", DeprecationWarning, stacklevel=1)
    with pytest.raises(DeprecationWarning, match="something else"):
        warnings.warn("something else", DeprecationWarning, stacklevel=1)


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
def test_every_platform_can_be_lowered_for(platform):
    def by_platform(x):
        return jax.lax.platform_dependent(x, cpu=jnp.sin, tpu=jnp.cos, default=jnp.exp)

    word = {"cpu": "sine", "tpu": "cosine", "cuda": "exponential"}[platform]
    for fn in (by_platform, jax.jit(by_platform)):
        assert f"stablehlo.{word} " in lower_for(platform, fn, jnp.ones(3)).as_text()


def test_no_other_file_asks_for_a_version():
    """Our own ``__version__`` is what others may read, and record."""
    for path in PACKAGE.rglob("*.py"):
        if path.name == "compat.py":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare | ast.If):
                names = {n.attr for n in ast.walk(node if isinstance(node, ast.Compare) else node.test) if isinstance(n, ast.Attribute)}
                assert not names & VERSION_WORDS, f"{path} branches on a version"


def test_a_program_for_a_mesh_lowers_for_a_gpu():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.shard_map(lambda x: jax.lax.psum(x, "data"), mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P())
    assert "all_reduce" in lower_for("cuda", everywhere, jnp.ones(4)).as_text()


def test_other_errors_are_not_swallowed():
    def broken(x):
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        lower_for("cuda", broken, jnp.ones(4))
