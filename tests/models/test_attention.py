"""Attention: every path against a float64 reference, and that none of them ever holds a whole pattern of a long sequence."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from dlmscope_jax.models.attention import Visibility, attend, attention_pattern, mix
from dlmscope_jax.models.attention_kernels import cudnn, cudnn_supports, splash, splash_supports

HIGHEST = jax.lax.Precision.HIGHEST
RULES = ("bidirectional", "causal", "block_causal")


def reference(q, k, v, seen, scale, softcap):
    """Query by query in float64; ``seen`` [B, T, S]. Returns the mix and the pattern."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    batch, length, n_heads, _ = q.shape
    out, pattern = np.zeros(q.shape), np.zeros((batch, n_heads, length, k.shape[1]))
    for n in range(n_heads):
        of = n * k.shape[2] // n_heads
        scores = np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, of]) * scale
        if softcap is not None:
            scores = softcap * np.tanh(scores / softcap)
        scores = np.where(seen, scores, -1e30)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        pattern[:, n] = weights / weights.sum(-1, keepdims=True)
        out[:, :, n] = np.einsum("bts,bsh->bth", pattern[:, n], v[:, :, of])
    return out, pattern


def seen_by_loops(query, key, rule, block, window):
    """[B, T, S] written out from the definition."""
    seen = np.zeros((*query.shape, key.shape[1]), bool)
    for b, t, s in np.ndindex(seen.shape):
        i, j = query[b, t], key[b, s]
        ok = j >= 0
        if rule == "causal":
            ok &= j <= i
        if rule == "block_causal":
            ok &= j // block <= i // block
        if window is not None:
            ok &= i - j < window
        seen[b, t, s] = ok
    return seen


def heads(rng, batch, length, n_heads, n_kv_heads, width, keys=None, dtype=jnp.float32):
    shapes = [(batch, length, n_heads, width)] + [(batch, keys or length, n_kv_heads, width)] * 2
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def visibility(rng, batch, length, rule, padded, window, block=3, indexed=True):
    """Positions and, written out, what they mean; padding lies on either side and within."""
    query = np.tile(np.arange(length), (batch, 1))
    key = np.where(rng.random((batch, length)) < 0.3, -1, query) if padded else query
    see = Visibility(
        jnp.asarray(query[:1], jnp.int32),
        jnp.asarray(key if padded else key[:1], jnp.int32),
        window=None if window is None else jnp.int32(window),
        rule=rule,
        block_length=block,
        padded=padded,
        indexed=indexed,
    )
    return see, seen_by_loops(query, key, rule, block, window)


def sighted(seen):
    """[B, T] queries that see something; what the others compute means nothing."""
    return seen.any(-1)


@pytest.mark.some(20)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("window", [None, 4], ids=["far", "window"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["plain", "softcap"])
@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_equals_the_reference(rule, padded, window, softcap, n_kv_heads):
    rng = np.random.default_rng(0)
    q, k, v = heads(rng, 2, 11, 4, n_kv_heads, 6)
    see, seen = visibility(rng, 2, 11, rule, padded, window)
    want, want_pattern = reference(q, k, v, seen, 0.7, softcap)
    real = sighted(seen)
    got = jax.jit(attend, static_argnums=(4, 5, 6))(q, k, v, see, 0.7, softcap, HIGHEST)
    pattern = attention_pattern(q, k, see, 0.7, softcap, HIGHEST)
    np.testing.assert_allclose(np.asarray(got)[real], want[real], atol=3e-6)
    np.testing.assert_allclose(np.swapaxes(pattern, 1, 2)[real], np.swapaxes(want_pattern, 1, 2)[real], atol=3e-6)
    np.testing.assert_allclose(np.asarray(mix(pattern, v, HIGHEST))[real], want[real], atol=3e-6)
    assert np.isfinite(got).all()


@pytest.mark.some(3)
@pytest.mark.parametrize("rule,padded,window,softcap", [
    ("causal", False, None, None), ("bidirectional", True, None, 3.0), ("block_causal", True, None, None), ("causal", True, 300, 3.0),
])  # fmt: skip
@pytest.mark.parametrize("length", [1030, 1536])
def test_a_long_sequence_equals_the_reference(rule, padded, window, softcap, length):
    rng = np.random.default_rng(1)
    q, k, v = heads(rng, 2, length, 2, 1, 4)
    query = np.tile(np.arange(length), (2, 1))
    key = np.where(rng.random((2, length)) < 0.3, -1, query) if padded else query
    i, j = query[:, :, None], key[:, None, :]
    seen = {"causal": j <= i, "block_causal": j // 32 <= i // 32, "bidirectional": np.ones_like(j <= i)}[rule] & (j >= 0)
    seen = seen & (i - j < window) if window is not None else seen
    traced = None if window is None else jnp.int32(window)
    see = Visibility(jnp.asarray(query[:1]), jnp.asarray(key), window=traced, rule=rule, block_length=32, padded=padded)
    want, _ = reference(q, k, v, seen, 0.5, softcap)
    got = jax.jit(attend, static_argnums=(4, 5, 6))(q, k, v, see, 0.5, softcap, HIGHEST)
    np.testing.assert_allclose(np.asarray(got)[sighted(seen)], want[sighted(seen)], atol=3e-6)


def test_the_order_of_positions_is_what_counts():
    """A cache: keys in any order, some not written; queries in the middle of the sequence."""
    rng = np.random.default_rng(2)
    q, k, v = heads(rng, 2, 5, 2, 2, 4, keys=9)
    key = np.stack([rng.permutation(9) for _ in range(2)])
    key[key > 6] = -1
    query = np.array([[2, 3, 4, 5, 6], [0, 1, 2, 3, 4]])
    see = Visibility(jnp.asarray(query), jnp.asarray(key), rule="causal", padded=True)
    want, _ = reference(q, k, v, seen_by_loops(query, key, "causal", 1, None), 1.0, None)
    np.testing.assert_allclose(attend(q, k, v, see, 1.0, None, HIGHEST), want, atol=3e-6)


@pytest.mark.some(2)
@pytest.mark.parametrize("rule,padded,softcap", [("causal", False, None), ("bidirectional", True, 3.0)])
@pytest.mark.parametrize("length", [24, 1100])
def test_gradients_equal_those_of_the_whole_pattern(rule, padded, softcap, length):
    rng = np.random.default_rng(3)
    q, k, v = heads(rng, 2, length, 2, 1, 4)
    keep = rng.random((2, length)) < 0.7 if padded else np.ones((2, length), bool)
    keep[:, 0] = True
    position = np.tile(np.arange(length), (2, 1))
    see = Visibility(jnp.asarray(position), jnp.asarray(np.where(keep, position, -1)), rule=rule, padded=padded)
    weight = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

    def whole(q, k, v):
        return mix(attention_pattern(q, k, see, 0.5, softcap, HIGHEST), v, HIGHEST)

    def loss(function, *arrays):
        return jnp.sum(weight * function(*arrays))

    want = jax.grad(partial(loss, whole), argnums=(0, 1, 2))(q, k, v)
    got = jax.jit(jax.grad(partial(loss, lambda q, k, v: attend(q, k, v, see, 0.5, softcap, HIGHEST)), argnums=(0, 1, 2)))(q, k, v)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6 * float(jnp.abs(b).max()) + 1e-7)


def test_a_row_that_sees_nothing_is_finite_and_so_is_its_gradient():
    q, k, v = heads(np.random.default_rng(4), 1, 6, 2, 2, 4)
    see = Visibility(jnp.arange(6)[None], jnp.full((1, 6), -1), rule="causal", padded=True)
    out, grads = jax.value_and_grad(lambda q: jnp.sum(attend(q, k, v, see, 1.0, None, HIGHEST)))(q)
    assert np.isfinite(out) and np.isfinite(grads).all()


# ---- memory


def sizes_in(text):
    """The element counts of all arrays that a compiled program mentions."""
    return {int(np.prod([int(n) for n in dims.split(",")])) for dims in re.findall(r"(?:f32|bf16|f16|pred|s32)\[([\d,]+)\]", text)}


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "gradient"])
def test_no_program_holds_a_pattern_of_a_long_sequence(gradient):
    batch, length, n_heads = 2, 2048, 4
    q, k, v = (jax.ShapeDtypeStruct((batch, length, n_heads, 8), jnp.float32) for _ in range(3))

    def see(n):
        return Visibility(jnp.arange(n)[None], jnp.arange(n)[None], rule="causal", indexed=True)

    def run(q, k, v):
        return jnp.sum(attend(q, k, v, see(length), 0.3, None, HIGHEST) ** 2)

    def whole(q, k, v):
        return jnp.sum(mix(attention_pattern(q, k, see(length), 0.3, None, HIGHEST), v, HIGHEST) ** 2)

    derive = partial(jax.grad, argnums=(0, 1, 2)) if gradient else lambda f: f
    limit = n_heads * length * length
    compiled = jax.jit(derive(run)).lower(q, k, v).compile()
    assert max(sizes_in(compiled.as_text())) < limit
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * limit
    assert max(sizes_in(jax.jit(derive(whole)).lower(q, k, v).compile().as_text())) >= limit  # the measure can see one
    # other platforms: what is handed to their compilers
    for platform in ("cuda", "tpu"):
        lowered = jax.jit(derive(run)).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()
        found = {int(np.prod([int(n) for n in dims.split("x")[:-1]])) for dims in re.findall(r"tensor<((?:\d+x)+(?:f32|i1|i32))>", lowered)}
        assert length * 512 * n_heads * batch in found and max(found) < batch * limit


# ---- splash attention, as plain operations


def masked(rng, batch, length, rule, padded):
    keep = np.ones((batch, length), bool)
    if padded:
        keep[0, -100:] = False
        keep[1, :30] = False
    position = np.tile(np.arange(length), (batch, 1))
    key = np.where(keep, position, -1)
    i, j = position[:, :, None], key[:, None, :]
    seen = {"causal": j <= i, "block_causal": j // 48 <= i // 48, "bidirectional": np.ones_like(j <= i)}[rule] & (j >= 0)
    see = Visibility(jnp.asarray(position[:1]), jnp.asarray(key), rule=rule, block_length=48, padded=padded, indexed=True)
    return see, seen, keep


@pytest.mark.some(3)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("padded,softcap", [(False, None), (True, 2.0)])
def test_splash_equals_the_reference(rule, padded, softcap):
    rng = np.random.default_rng(5)
    q, k, v = heads(rng, 2, 256, 4, 2, 128, dtype=jnp.bfloat16)
    see, seen, keep = masked(rng, 2, 256, rule, padded)
    assert splash_supports(q, k, see, None) == (jax.device_count() == 1)
    want, _ = reference(q, k, v, seen, 0.09, softcap)
    got = jax.jit(lambda q, k, v: splash(q, k, v, see, 0.09, softcap, None, interpret=True))(q, k, v)
    assert got.dtype == q.dtype
    np.testing.assert_allclose(np.asarray(got, np.float64)[keep], want[keep], atol=0.03)
    assert np.isfinite(np.asarray(got, np.float64)).all()


@pytest.mark.parametrize("rule,padded", [("block_causal", False), ("bidirectional", True)])
def test_splash_gradients_equal_those_of_the_pattern(rule, padded):
    rng = np.random.default_rng(6)
    q, k, v = heads(rng, 2, 256, 2, 1, 128, dtype=jnp.bfloat16)
    see, _, keep = masked(rng, 2, 256, rule, padded)
    weight = jnp.asarray(rng.normal(size=q.shape) * keep[:, :, None, None], jnp.float32)

    def loss(function, *arrays):
        return jnp.sum(weight * function(*arrays).astype(jnp.float32))

    def by_pattern(q, k, v):
        return mix(attention_pattern(q, k, see, 0.09, None, None), v, None)

    want = jax.jit(jax.grad(partial(loss, by_pattern), argnums=(0, 1, 2)))(*(a.astype(jnp.float32) for a in (q, k, v)))
    got = jax.jit(jax.grad(partial(loss, lambda q, k, v: splash(q, k, v, see, 0.09, None, None, interpret=True)), argnums=(0, 1, 2)))(
        q, k, v
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float64), b, atol=0.02 * float(jnp.abs(b).max()))


def test_splash_divides_over_a_mesh(run_with_devices):
    run_with_devices(
        """
        import jax, jax.numpy as jnp, numpy as np
        from jax.sharding import AxisType, Mesh
        from dlmscope_jax.models.attention import Visibility, attend, attention_pattern, mix
        from dlmscope_jax.models.attention_kernels import splash, splash_supports
        mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        rng = np.random.default_rng(0)
        q, k, v = (jnp.asarray(rng.normal(size=(2, 256, n, 128)), jnp.bfloat16) for n in (4, 2, 2))
        keep = np.ones((2, 256), bool)
        keep[0, :40] = False
        for key in (jnp.arange(256)[None], jnp.where(keep, jnp.arange(256), -1)):
            see = Visibility(jnp.arange(256)[None], key, padded=key.shape[0] > 1)
            assert splash_supports(q, k, see, mesh) and not splash_supports(q, k, see, None)
            got = jax.jit(lambda q, k, v: splash(q, k, v, see, 0.1, None, mesh, interpret=True))(q, k, v)
            want = mix(attention_pattern(q, k, see, 0.1, None, None), v, None)
            np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.03)
            f32 = [a.astype(jnp.float32) for a in (q, k, v)]
            got = jax.jit(lambda q, k, v: attend(q, k, v, see, 0.1, None, None, mesh))(*f32)
            np.testing.assert_allclose(np.asarray(got), np.asarray(want, np.float32), atol=0.03)
        """,
        n_devices=4,
    )


# ---- which kernel takes which case


def shapes(length=512, n_heads=4, n_kv_heads=2, width=128, dtype=jnp.bfloat16, batch=2):
    return jax.ShapeDtypeStruct((batch, length, n_heads, width), dtype), jax.ShapeDtypeStruct((batch, length, n_kv_heads, width), dtype)


def plain(length=512, **changes):
    return Visibility(jnp.arange(length)[None], jnp.arange(length)[None], **changes)


@pytest.mark.skipif(jax.device_count() > 1, reason="written for one device")
def test_splash_refuses_what_it_cannot_do():
    supports = partial(splash_supports, mesh=None)
    assert supports(*shapes(), plain())
    assert supports(*shapes(), plain(rule="causal", indexed=True))
    assert not supports(*shapes(), plain(rule="causal"))  # a cache, or positions of the caller's own
    assert not supports(*shapes(), plain(window=jnp.int32(8)))
    assert not supports(*shapes(dtype=jnp.float32), plain())
    assert not supports(*shapes(length=500), plain(500))
    assert not supports(*shapes(length=128), plain(128))
    mesh = Mesh(np.array(jax.devices()).reshape(1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    assert splash_supports(*shapes(), plain(), mesh)


def test_cudnn_refuses_what_it_cannot_do():
    for q, k, see, softcap in (
        (*shapes(dtype=jnp.float32), plain(), None),
        (*shapes(), plain(rule="causal"), None),
        (*shapes(), plain(rule="block_causal", block_length=4, indexed=True), None),
        (*shapes(), plain(window=jnp.int32(8)), None),
        (*shapes(), plain(), 30.0),
        (*shapes(width=7), plain(), None),
    ):
        assert not cudnn_supports(q, k, see, softcap)


@pytest.mark.parametrize("rule,padded", [("bidirectional", False), ("bidirectional", True), ("causal", False), ("causal", True)])
def test_lowered_for_cuda_it_is_cudnn(rule, padded):
    q, k = shapes(length=2048)
    see = plain(2048, rule=rule, padded=padded, indexed=True)
    if not cudnn_supports(q, k, see, None):
        pytest.skip("jax traces cuDNN attention only where its CUDA plugin is installed")

    def loss(q, k, v):
        return jnp.sum(attend(q, k, v, see, 0.1, None, None).astype(jnp.float32))

    forward = jax.jit(loss).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmax" in forward and "2048x2048" not in forward
    backward = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaSoftmaxBackward" in backward and "2048x2048" not in backward


def test_padding_sorted_to_the_end_is_what_cudnn_needs(monkeypatch):
    """cuDNN is stood in for by jax's own implementation of the same arguments."""
    real = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *a, implementation, **kw: real(*a, implementation="xla", **kw))
    rng = np.random.default_rng(7)
    q, k, v = heads(rng, 3, 9, 4, 2, 8)
    for rule in ("bidirectional", "causal"):
        for padded in (False, True):
            see, seen = visibility(rng, 3, 9, rule, padded, None)
            want, _ = reference(q, k, v, seen, 0.3, None)
            with jax.default_matmul_precision("highest"):
                got = np.asarray(cudnn(q, k, v, see, 0.3))
            rows = sighted(seen) & (np.asarray(see.key) >= 0)
            np.testing.assert_allclose(got[rows], want[rows], atol=3e-6)


@pytest.mark.parametrize("rule", RULES)
def test_lowered_for_tpu_it_is_splash_attention(rule):
    if jax.device_count() > 1:
        pytest.skip("written for one device")
    q, k = shapes(length=2048)
    see = plain(2048, rule=rule, block_length=32, indexed=True)
    run = jax.jit(lambda q, k, v: attend(q, k, v, see, 0.1, None, None))
    lowered = run.trace(q, k, k).lower(lowering_platforms=("tpu",)).as_text()
    assert "tpu_custom_call" in lowered and "2048x2048" not in lowered
    assert "tpu_custom_call" not in run.trace(q, k, k).lower(lowering_platforms=("cpu",)).as_text()
