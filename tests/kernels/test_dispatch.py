"""The dispatcher: names work or raise, without a name the platform of the program decides, and a program says what it holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels import dispatch
from dlmscope_jax.kernels.dispatch import Implementation, Problem, ran


def scaled(x, factor, by=1.0):
    return jnp.sin(x) * (factor * by)


def needs_a_tpu(problem, platform):
    return None if platform == "tpu" else f"runs on a TPU only, this is {platform}"


def needs_width(problem, platform):
    return None if problem.width >= 4 else f"needs 4 entries a row, got {problem.width}"


TABLE = {
    "plain": Implementation(partial(scaled, by=1.0)),
    "wide": Implementation(partial(scaled, by=2.0), needs_width),
    "tpu_only": Implementation(partial(scaled, by=3.0), needs_a_tpu),
}


def by_platform(problem, platform):
    return "tpu_only" if platform == "tpu" else "wide" if problem.width >= 4 else "plain"


def same_everywhere(problem, platform):
    return "plain"


def op(x, name=None, default=by_platform):
    return dispatch.run("op", TABLE, default, Problem(x.shape[0], x.shape[1], 1, dtype=x.dtype), name, x, factor=10.0)


ONES = np.ones((2, 5), np.float32)
NARROW = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(("name", "by"), [("plain", 1), ("wide", 2)])
def test_a_name_runs_what_it_names(name, by):
    np.testing.assert_allclose(op(ONES, name), np.sin(ONES) * 10 * by, rtol=1e-6)
    assert ran(partial(op, name=name), ONES) == {f"op.{name}"}


@pytest.mark.parametrize(
    ("x", "name", "says"),
    [
        (ONES, "radix", "^op: implementation 'radix' is not known: one of plain, wide, tpu_only$"),
        (NARROW, "wide", "^op: 'wide' needs 4 entries a row, got 3: use 'plain'$"),
        (ONES, "tpu_only", "^op: 'tpu_only' runs on a TPU only, this is cpu: use 'plain' or 'wide'$"),
    ],
)
def test_a_name_that_cannot_is_never_replaced(x, name, says):
    with pytest.raises(UserError, match=says):
        op(x, name)


def test_without_a_name_the_rule_picks_by_problem():
    np.testing.assert_allclose(op(NARROW), np.sin(NARROW) * 10, rtol=1e-6)
    np.testing.assert_allclose(op(ONES), np.sin(ONES) * 20, rtol=1e-6)
    assert ran(op, NARROW) == {"op.plain"} and ran(jax.jit(op), ONES) == {"op.wide"}


@pytest.mark.parametrize(("platform", "name"), [("cpu", "op.wide"), ("tpu", "op.tpu_only"), ("cuda", "op.wide")])
def test_the_platform_that_a_program_is_lowered_for_decides(platform, name):
    assert ran(op, jax.ShapeDtypeStruct(ONES.shape, ONES.dtype), platform=platform) == {name}
    text = jax.jit(op).trace(ONES).lower(lowering_platforms=(platform,)).as_text()
    assert text.count("stablehlo.sine") == 1  # what the other platforms would run is not in the program


def test_one_choice_for_all_platforms_is_a_plain_call():
    text = str(jax.make_jaxpr(partial(op, default=same_everywhere))(ONES))
    assert "platform_index" not in text and "cond" not in text
    assert "platform_index" in str(jax.make_jaxpr(op)(ONES))


def test_under_vmap_and_grad_and_in_loops():
    np.testing.assert_allclose(jax.vmap(op)(np.stack([ONES, 2 * ONES])), [np.sin(ONES) * 20, np.sin(2 * ONES) * 20], rtol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda x: op(x).sum())(ONES), np.cos(ONES) * 20, rtol=1e-6)

    def loop(x):
        return jax.lax.fori_loop(0, 2, lambda i, y: op(y), x)

    np.testing.assert_allclose(jax.jit(loop)(ONES), np.sin(np.sin(ONES) * 20) * 20, rtol=1e-4)
    assert ran(jax.grad(lambda x: loop(x).sum() + op(x, "plain").sum()), ONES) == {"op.wide", "op.plain"}


def test_what_other_platforms_would_run_is_traced_once():
    traced = []

    def count(x, factor):
        traced.append(x.shape)
        return x * factor

    table = TABLE | {"tpu_only": Implementation(count)}

    def again(x):
        return dispatch.run("op", table, by_platform, Problem(*x.shape, 1), None, x, factor=10.0)

    for _ in range(3):
        again(ONES)
        jax.jit(lambda x: again(x) + 1)(ONES)
    assert traced == [ONES.shape]


def test_a_program_without_operations_holds_none():
    assert ran(jnp.sin, ONES) == set()


def test_a_problem_holds_a_dtype_however_it_is_named():
    assert Problem(1, 2, 1, dtype="bfloat16") == Problem(1, 2, 1, dtype=jnp.bfloat16)
