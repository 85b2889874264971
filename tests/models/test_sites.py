"""Every site of every kind of network: its shape, and that setting, masking, freezing and differentiating it do what they say.

One program a network holds a ``set`` edit at every site; strengths, values, layers and masks are data, so that all tests
of a network share one compilation, which is itself tested.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import NETWORKS, random_network

from dlmscope_jax.errors import UserError
from dlmscope_jax.models import Edit, InDictionary, canonical_site, init_params, parse_site, site_width, sites_of

BATCH, LENGTH, LAYER = 2, 7, 1
FINAL = ("final_norm", "final_norm_scale")
SCALES = ("attn_norm_scale", "mlp_norm_scale", "attn_post_norm_scale", "mlp_post_norm_scale")


def tokens_of(seed, length=LENGTH):
    return jax.random.randint(jax.random.key(seed), (BATCH, length), 4, 97)


def noise(shape, seed):
    return jax.random.normal(jax.random.key(seed), shape)


class Bench:
    """A network, and one compiled program that can set any of its sites."""

    def __init__(self, name):
        self.model, self.params = random_network(NETWORKS[name])
        self.config = self.model.config
        self.names = (*sites_of(self.config), *FINAL)
        self.tokens, self.traces = tokens_of(7), 0
        self.collect = tuple(f"{name}@{layer}" for name in sites_of(self.config) for layer in range(3)) + FINAL
        self._run = jax.jit(self._forward)
        self._clean = None

    def _forward(self, params, tokens, edits):
        self.traces += 1
        out = self.model.apply(params, tokens, collect=self.collect, edits=edits)
        return out.logits, out.taps

    @property
    def clean(self):
        if self._clean is None:
            self._clean = self.run()
        return self._clean

    def place(self, name):
        return 3 if name in FINAL else LAYER

    def shape(self, name):
        shape = {"attn_pattern": (4, LENGTH, LENGTH)}.get(name, (LENGTH, *heads_and_width(name, self.config)))
        return (BATCH, *shape)

    def edit(self, name, value=None, strength=0.0, layer=LAYER, mask=None):
        value = jnp.ones(self.shape(name)) if value is None else value
        mask = jnp.ones((BATCH, LENGTH), bool) if mask is None else mask
        return Edit("set", name if name in FINAL else f"{name}@{layer}", value, strength, mask)

    def run(self, tokens=None, **changes):
        """Logits and taps with some sites set: ``z=value``, or ``z=dict(value=..., strength=..., layer=..., mask=...)``."""
        changes = {n: c if isinstance(c, dict) else {"value": c} for n, c in changes.items()}
        edits = tuple(self.edit(n, **({"strength": 1.0} | changes[n] if n in changes else {})) for n in self.names)
        logits, taps = self._run(self.params, self.tokens if tokens is None else tokens, edits)
        assert self.traces == 1, "new values, strengths, layers and masks must not compile again"
        return logits, taps


def heads_and_width(name, config):
    """What sites.py documents, of one token."""
    n, k, h = config.n_heads, config.n_kv_heads, config.head_dim
    one = dict.fromkeys((*SCALES, "final_norm_scale"), (1,))
    known = {"q": (n, h), "k": (k, h), "v": (k, h), "z": (n, h), "q_norm_scale": (n, 1), "k_norm_scale": (k, 1), "mlp_act": (config.d_mlp,)}
    return (one | known).get(name, (config.d_model,))


@functools.cache
def bench_of(name):
    return Bench(name)


BENCHES = ["gpt2", "neox", "gemma2", "qwen3", "mdlm", "blocks"]  # the others have no switch of their own


@pytest.fixture(params=[name if name in ("gpt2", "gemma2", "mdlm") else pytest.param(name, marks=pytest.mark.slow) for name in BENCHES])
def bench(request):
    return bench_of(request.param)


EVERYWHERE = set("resid_pre attn_norm_scale attn_in q k v attn_pattern z attn_out mlp_norm_scale mlp_in mlp_act mlp_out resid_post".split())
SOMEWHERE = {
    "llama": {"resid_mid"},
    "gpt2": {"resid_mid"},
    "neox": set(),
    "gemma2": {"resid_mid", "attn_raw", "mlp_raw", "attn_post_norm_scale", "mlp_post_norm_scale"},
    "qwen3": {"resid_mid", "q_norm_scale", "k_norm_scale"},
    "mdlm": {"resid_mid", "attn_raw", "mlp_raw"},
    "dream": {"resid_mid"},
    "blocks": {"resid_mid"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_which_sites_a_network_has(name):
    assert set(sites_of(NETWORKS[name])) == EVERYWHERE | SOMEWHERE[name]


@pytest.mark.some(2)
def test_every_site_can_be_collected(bench):
    logits, taps = bench.clean
    assert logits.shape == (BATCH, LENGTH, 97) and set(taps) == set(bench.names)
    for name in bench.names:
        assert set(taps[name]) == ({3} if name in FINAL else {0, 1, 2})
        for layer, tap in taps[name].items():
            assert tap.shape == bench.shape(name), name
            assert jnp.isfinite(tap).all() and jnp.std(tap) > 0, (name, layer)
        if name != "attn_pattern":
            assert site_width(name if name in FINAL else f"{name}@0", bench.config) == np.prod(bench.shape(name)[2:])
    with pytest.raises(UserError, match="attn_pattern@0' has no fixed width"):
        site_width("attn_pattern@0", bench.config)


def test_sites_fit_together(bench):
    """What the sites mean, from taps alone: sums of the residual stream, norms with their scales, values mixed by patterns."""
    _, taps = bench.clean
    config, tree = bench.config, bench.params["params"]
    close = functools.partial(np.testing.assert_allclose, atol=1e-5, rtol=1e-5)
    for layer in range(3):
        at = {name: np.asarray(taps[name][layer]) for name in sites_of(config)}
        middle = at["resid_pre"] + at["attn_out"]
        if not config.parallel:
            close(at["resid_mid"], middle)
        close(at["resid_post"], middle + at["mlp_out"])
        if layer:
            close(at["resid_pre"], taps["resid_post"][layer - 1], atol=0)
        close(at["attn_pattern"].sum(-1), 1.0)
        close(at["z"], mixed(at["attn_pattern"], at["v"]))
        for norm, read, write in norms(config):
            wide = at[read] - (at[read].mean(-1, keepdims=True) if config.norm == "layer" else 0)
            close(at[f"{norm}_scale"], np.sqrt((wide**2).mean(-1, keepdims=True) + config.norm_eps))
            if config.cond_dim is None:
                gain, bias = (np.asarray(tree["blocks"].get(n, np.zeros((3, 1)))[layer]) for n in (norm, f"{norm}_bias"))
                close(at[write], wide / at[f"{norm}_scale"] * (gain + config.norm_offset) + bias)


def mixed(pattern, v):
    """[B, N, T, S] and [B, S, K, H]: head n reads the values of group n // (N / K)."""
    share = pattern.shape[1] // v.shape[2]
    return np.stack([np.einsum("bts,bsh->bth", pattern[:, n], v[:, :, n // share]) for n in range(pattern.shape[1])], axis=2)


def norms(config):
    """(norm, what it reads, what it writes) of the norms whose input and output are both sites."""
    found = [("attn_norm", "resid_pre", "attn_in"), ("mlp_norm", "resid_pre" if config.parallel else "resid_mid", "mlp_in")]
    return found + ([("attn_post_norm", "attn_raw", "attn_out"), ("mlp_post_norm", "mlp_raw", "mlp_out")] if config.post_norms else [])


def test_setting_a_site_to_its_own_value_changes_nothing(bench):
    logits, taps = bench.clean
    for name in bench.names:
        again, _ = bench.run(**{name: taps[name][bench.place(name)]})
        np.testing.assert_allclose(again, logits, atol=1e-5, err_msg=name)


def test_setting_a_site_to_another_value_changes_the_logits(bench):
    logits, taps = bench.clean
    for name in bench.names:
        place = bench.place(name)
        value = taps[name][place][::-1] + (1.0 if name.endswith("scale") else 0.0)
        changed, after = bench.run(**{name: value})
        np.testing.assert_allclose(after[name][place], value, atol=1e-5, err_msg=name)
        assert jnp.abs(changed - logits).max() > 1e-2, name
        if name not in FINAL:
            np.testing.assert_array_equal(after[name][0], taps[name][0], err_msg=name)


@pytest.mark.some(2)
def test_no_strength_no_positions_and_no_such_layer_leave_the_bits(bench):
    """Bit for bit what edits give that no layer reaches, and what the program without edits gives.

    Where the compiler fuses a product with the sum behind it (gates, offsets) only an edit between them keeps them apart.
    """
    weak = {name: dict(value=noise(bench.shape(name), 1), strength=0.0) for name in bench.names}
    nowhere = {n: dict(value=noise(bench.shape(n), 2), mask=jnp.zeros((BATCH, LENGTH), bool)) for n in bench.names}
    beyond = {n: dict(value=noise(bench.shape(n), 3), layer=99) for n in bench.names if n not in FINAL}
    logits, taps = bench.run(**beyond)
    for changes in ({}, weak, nowhere):
        again, also = bench.run(**changes)
        np.testing.assert_array_equal(again, logits)
        jax.tree.map(np.testing.assert_array_equal, also, taps)
    bare = jax.jit(lambda params, tokens: bench.model.apply(params, tokens, collect=bench.collect))(bench.params, bench.tokens)
    if bench.config.added_apart:
        np.testing.assert_allclose(bare.logits, logits, atol=2e-5, rtol=0)
    else:
        np.testing.assert_array_equal(bare.logits, logits)
        jax.tree.map(np.testing.assert_array_equal, bare.taps, taps)


def test_positions_are_tokens_and_for_patterns_queries(bench):
    _, taps = bench.clean
    mask = jnp.zeros((BATCH, LENGTH), bool).at[1, 3].set(True)
    for name in bench.names:
        place = bench.place(name)
        _, after = bench.run(**{name: dict(value=taps[name][place] + 1, mask=mask)})
        moved = np.asarray(jnp.abs(after[name][place] - taps[name][place]) > 0.5)
        rows = moved.transpose(0, 2, 1, 3) if name == "attn_pattern" else moved
        expected = np.asarray(mask).reshape(BATCH, LENGTH, *[1] * (rows.ndim - 2))
        np.testing.assert_array_equal(rows, np.broadcast_to(expected, rows.shape), err_msg=name)


def test_a_frozen_pattern_mixes_the_values_of_the_other_text(bench):
    _, first = bench.clean
    pattern = first["attn_pattern"][LAYER]
    _, second = bench.run(tokens_of(8), attn_pattern=pattern)
    assert jnp.abs(second["v"][LAYER] - first["v"][LAYER]).max() > 1e-2
    np.testing.assert_allclose(second["z"][LAYER], mixed(np.asarray(pattern), np.asarray(second["v"][LAYER])), atol=1e-5)


def not_additive(f, x, y):
    """How far a map is from an affine one."""
    return float(jnp.abs(f(x + y) - f(x) - f(y) + f(jnp.zeros_like(x))).max())


def test_a_frozen_scale_makes_its_norm_linear(bench):
    _, taps = bench.run(tokens_of(8))
    places = [(f"{norm}_scale", read, write) for norm, read, write in norms(bench.config)]
    for scale, read, write in [*places, ("final_norm_scale", "resid_post", "final_norm")]:
        last = write in FINAL
        layer, place = (2, 3) if last else (LAYER, LAYER)
        x, y = noise(bench.shape(read), 1), noise(bench.shape(read), 2)
        free = lambda x: bench.run(**{read: dict(value=x, layer=layer)})[1][write][place]  # noqa: E731, B023
        frozen = lambda x: bench.run(**{read: dict(value=x, layer=layer), scale: taps[scale][place]})[1][write][place]  # noqa: E731, B023
        assert not_additive(frozen, x, y) < 1e-4, scale
        assert not_additive(free, x, y) > 0.1, scale


@pytest.mark.parametrize("name", ["q", "k"])
def test_frozen_scales_of_heads_make_scores_linear(name):
    bench = bench_of("qwen3")
    _, taps = bench.clean
    scale = f"{name}_norm_scale"
    seen = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))

    def scores(x, **frozen):
        pattern = bench.run(**{name: x}, **frozen)[1]["attn_pattern"][LAYER]
        logs = jnp.log(jnp.where(seen, pattern, 1.0))
        return jnp.where(seen, logs - logs.sum(-1, keepdims=True) / jnp.arange(1.0, LENGTH + 1)[:, None], 0.0)

    x, y = 0.3 * noise(bench.shape(name), 1), 0.3 * noise(bench.shape(name), 2)
    assert not_additive(lambda x: scores(x, **{scale: taps[scale][LAYER]}), x, y) < 1e-4
    assert not_additive(scores, x, y) > 0.1


@pytest.mark.parametrize("network", [name if name in ("gpt2", "mdlm") else pytest.param(name, marks=pytest.mark.slow) for name in BENCHES])
def test_gradients_at_every_site_equal_differences(network):
    """The gradient of an edit that adds zero is the gradient at the site."""
    bench = bench_of(network)
    weights = noise((BATCH, LENGTH, 97), 5) / 40

    def loss(values, params):
        edits = tuple(Edit("add", n if n in FINAL else f"{n}@{LAYER}", v) for n, v in values.items())
        return (bench.model.apply(params, bench.tokens, edits=edits).logits * weights).sum()

    both = jax.jit(jax.value_and_grad(loss))
    zeros = {name: jnp.zeros(bench.shape(name)) for name in bench.names}
    slopes = both(zeros, bench.params)[1]
    for seed, name in enumerate(bench.names):
        towards = noise(bench.shape(name), seed)
        if name == "attn_pattern":  # what a query does not see has no difference to make
            towards = jnp.where(bench.clean[1][name][LAYER] > 0, towards, 0.0)

        def along(h, name=name, towards=towards):
            ends = [float(both(zeros | {name: step * towards}, bench.params)[0]) for step in (h, -h)]
            return (ends[0] - ends[1]) / (2 * h)

        slope = float((slopes[name] * towards).sum())
        assert abs(slope) > 1e-3, name
        np.testing.assert_allclose(slope, (4 * along(0.01) - along(0.02)) / 3, rtol=2e-2, atol=2e-3, err_msg=name)


@pytest.mark.slow
def test_gradients_of_every_kind_equal_differences(dictionary):
    """One kind at each of seven sites, the heads' among them."""
    bench = bench_of("llama")
    spec, weights = dictionary
    mix = noise((BATCH, LENGTH, 97), 5) / 40
    make = {
        "set": lambda v: Edit("set", "mlp_in@1", v),
        "scale": lambda v: Edit("scale", "attn_pattern@1", v),
        "project_out": lambda v: Edit("project_out", "v@1", v),
        "strength": lambda v: Edit("add", "k@1", noise(bench.shape("k"), 3), v),
        "clamp_code": lambda v: Edit("clamp_code", "z@1", InDictionary(spec, weights, 2, v)),
        "replace_by_dictionary": lambda v: Edit("replace_by_dictionary", "q@1", InDictionary(spec, {"W": v})),
        "ablate_code": lambda v: Edit("ablate_code", "mlp_out@1", InDictionary(spec, {"W": v}, 2), read_site="mlp_in@1"),
    }
    values = {
        "set": bench.clean[1]["mlp_in"][LAYER], "scale": jnp.full(LENGTH, 0.7), "project_out": noise((8,), 1), "strength": jnp.float32(0.5),
        "clamp_code": jnp.float32(0.3), "replace_by_dictionary": weights["W"], "ablate_code": weights["W"],
    }  # fmt: skip

    @jax.jit
    @jax.value_and_grad
    def both(values):
        return (bench.model.apply(bench.params, bench.tokens, edits=tuple(make[k](v) for k, v in values.items())).logits * mix).sum()

    slopes = both(values)[1]
    for kind, value in values.items():
        towards = noise(jnp.shape(value), 4)

        def along(h, kind=kind, value=value, towards=towards):
            ends = [float(both(values | {kind: value + step * towards})[0]) for step in (h, -h)]
            return (ends[0] - ends[1]) / (2 * h)

        slope = float((slopes[kind] * towards).sum())
        assert abs(slope) > 1e-3, kind
        np.testing.assert_allclose(slope, (4 * along(0.01) - along(0.02)) / 3, rtol=2e-2, atol=2e-3, err_msg=kind)


def test_a_dictionary_does_not_fit_a_pattern(dictionary):
    for where in (dict(site="attn_pattern@1"), dict(site="attn_out@1", read_site="attn_pattern@1")):
        with pytest.raises(UserError, match="attn_pattern.*as long as the text") as caught:
            Edit("replace_by_dictionary", value=InDictionary(*dictionary), **where)
        assert "\n" not in str(caught.value)


def test_patterns_are_kept_only_where_they_are_collected(bench):
    tokens = tokens_of(7, 37)

    def kept(**asked):
        """Whether the layer loop gives back or hands on anything with queries and keys."""
        program = jax.make_jaxpr(lambda p: bench.model.apply(p, tokens, **asked).logits)(bench.params)
        loops = [equation for equation in program.jaxpr.eqns if equation.primitive.name == "scan"]
        assert len(loops) == 1
        return any(v.aval.shape.count(37) > 1 for v in loops[0].outvars)

    assert kept(collect=("attn_pattern@1",))
    assert not kept() and not kept(collect=("z@1", "q@0")) and not kept(edits=(Edit("scale", "attn_pattern@1", 0.5),))


def test_no_whole_pattern_of_a_long_text_unless_it_is_asked_for(bench):
    """Nothing in the traced program, loops and branches included, has a side of queries and one of keys."""
    model = bench.model.clone(config=dataclasses.replace(bench.config, max_positions=2048))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    tokens = jax.ShapeDtypeStruct((1, 2048), jnp.int32)

    def whole(**asked):
        return "2048,2048]" in str(jax.make_jaxpr(lambda p, t: model.apply(p, t, **asked).logits)(params, tokens))

    assert not whole() and not whole(collect=("z@1", "q@1"), edits=(Edit("scale", "z@1", 0.5),))
    assert whole(collect=("attn_pattern@1",)) and whole(edits=(Edit("scale", "attn_pattern@1", 0.5),))


def test_what_is_not_asked_for_leaves_the_program_as_it_is(bench):
    def text(**asked):
        def run(params, tokens):
            out = bench.model.apply(params, tokens, **asked)
            return out.logits, out.taps

        return jax.jit(run).lower(bench.params, bench.tokens).as_text()

    assert text(collect=(), edits=()) == text() != text(collect=("z@1",))


@pytest.mark.some(2)
@pytest.mark.parametrize(("kind", "site", "read"), [
    ("replace_by_dictionary", "z", None), ("clamp_code", "z", None), ("ablate_code", "q", None),
    ("replace_by_dictionary", "z", "attn_in"), ("replace_by_dictionary", "attn_out", "z"),
])  # fmt: skip
def test_a_dictionary_of_heads_reads_them_one_after_the_other(kind, site, read, dictionary):
    bench = bench_of("llama")  # 4 heads of 8, as wide as the dictionary
    spec, weights = dictionary
    where = noise((BATCH, LENGTH), 9) > 0
    value = InDictionary(spec, weights, None if kind.startswith("replace") else 2, 1.5)
    edit = Edit(kind, f"{site}@1", value, positions=where, read_site=read and f"{read}@1")
    got = bench.model.apply(bench.params, bench.tokens, logits=False, collect=(f"{site}@1",), edits=(edit,)).taps[site][1]
    flat = lambda name: bench.clean[1][name][1].reshape(BATCH, LENGTH, 32)  # noqa: E731
    x, source = flat(site), flat(read or site)
    codes = spec.encode(weights, source)
    wanted = {
        "replace_by_dictionary": spec.decode(weights, codes),
        "clamp_code": x + (1.5 - codes.latent(2))[..., None] * weights["W"][2],
        "ablate_code": x - codes.latent(2)[..., None] * weights["W"][2],
    }[kind]
    np.testing.assert_allclose(got.reshape(x.shape), jnp.where(where[..., None], wanted, x), atol=1e-5)


@pytest.mark.parametrize("name", NETWORKS)
def test_sites_that_a_network_lacks_are_named(name):
    model, params = random_network(NETWORKS[name])
    lacking = sorted(set().union(*SOMEWHERE.values()) - SOMEWHERE[name])
    assert lacking
    for site in lacking:
        with pytest.raises(UserError, match=f"no {site}") as caught:
            model.apply(params, tokens_of(0), collect=(f"{site}@1",))
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=f"no {site}") as caught:
            model.apply(params, tokens_of(0), edits=(Edit("scale", f"{site}@1", 1.0),))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("alias", "site"),
    [
        ("blocks.5.attn.hook_q", "q@5"), ("blocks.5.attn.hook_k", "k@5"), ("blocks.5.attn.hook_v", "v@5"), ("blocks.5.attn.hook_z", "z@5"),
        ("blocks.5.attn.hook_pattern", "attn_pattern@5"), ("blocks.5.ln1.hook_scale", "attn_norm_scale@5"),
        ("blocks.5.ln2.hook_scale", "mlp_norm_scale@5"), ("ln_final.hook_scale", "final_norm_scale"),
        ("blocks.5.ln1.hook_normalized", "attn_in@5"), ("blocks.5.ln2.hook_normalized", "mlp_in@5"),
        ("blocks.12.hook_resid_mid", "resid_mid@12"), ("h.3", "resid_post@3"), ("transformer.h.3.ln_2", "mlp_in@3"),
        ("h.3.ln_1", "attn_in@3"), ("transformer.h.3.attn.c_proj", "attn_out@3"), ("h.3.mlp", "mlp_out@3"),
        ("gpt_neox.layers.2", "resid_post@2"), ("gpt_neox.layers.2.attention.dense", "attn_out@2"),
        ("gpt_neox.layers.2.mlp.dense_4h_to_h", "mlp_out@2"), ("gpt_neox.layers.2.post_attention_layernorm", "mlp_in@2"),
        ("blocks.5.hook_mlp_in", "resid_mid@5"),
        ("gpt_neox.layers.2.input_layernorm", "attn_in@2"), ("transformer.blocks.3.attn_norm", "attn_in@3"),
        ("model.transformer.blocks.3.attn_norm", "attn_in@3"), ("model.transformer.blocks.3.ff_norm", "mlp_in@3"),
        ("model.layers.3.input_layernorm", "attn_in@3"), ("model.layers.3.self_attn.o_proj", "attn_out@3"),
    ],
)  # fmt: skip
def test_aliases(alias, site):
    assert canonical_site(alias) == site
    assert parse_site(alias) == parse_site(site)


@pytest.mark.parametrize(
    ("path", "site"),
    [
        ("backbone.blocks.1", "resid_post@1"), ("backbone.blocks.1.attn_out", "attn_raw@1"), ("backbone.blocks.1.mlp", "mlp_raw@1"),
        ("backbone.blocks.1.mlp.2", "mlp_raw@1"), ("backbone.blocks.1.mlp.1", "mlp_act@1"),
    ],
)  # fmt: skip
def test_module_paths_of_mdlm(path, site):
    """Its projections' outputs are gated before they are added; what its norms give is shifted and scaled: no site."""
    assert canonical_site(path) == canonical_site(path, NETWORKS["mdlm"]) == site
    for norm in ("norm1", "norm2", "mlp.0", "attn_qkv"):
        with pytest.raises(UserError, match="is not known"):
            canonical_site(f"backbone.blocks.1.{norm}", NETWORKS["mdlm"])


def test_module_paths_of_a_model_that_norms_outputs():
    """Gemma-2's modules: the projections' outputs are raw, what the later norms give is added."""
    config = NETWORKS["gemma2"]
    for path, site in [
        ("model.layers.1.self_attn", "attn_raw@1"), ("model.layers.1.post_attention_layernorm", "attn_out@1"),
        ("model.layers.1.pre_feedforward_layernorm", "mlp_in@1"), ("model.layers.1.mlp.down_proj", "mlp_raw@1"),
        ("model.layers.1.post_feedforward_layernorm", "mlp_out@1"), ("model.layers.1", "resid_post@1"),
    ]:  # fmt: skip
        assert canonical_site(path, config) == site
    assert canonical_site("model.layers.1.mlp") == "mlp_out@1"


def test_values_as_wide_as_all_heads():
    """A direction of all heads side by side does what the same numbers by heads do; a rule sees rows."""
    model, params = random_network(NETWORKS["llama"])
    heads, width = model.config.n_heads, model.config.head_dim
    value = jax.random.normal(jax.random.key(4), (heads * width,))

    class Double:
        def at(self, x):
            assert x.shape[-1] == heads * width
            return x

    run = lambda *edits: model.apply(params, tokens_of(0), edits=edits).logits  # noqa: E731
    flat, split = run(Edit("add", "z@1", value)), run(Edit("add", "z@1", value.reshape(heads, width)))
    np.testing.assert_array_equal(flat, split)
    np.testing.assert_allclose(run(Edit("add", "z@1", Double())), run(Edit("scale", "z@1", 2.0)), atol=2e-5)
