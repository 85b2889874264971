"""One forward pass over token blocks under a corruption, on one device or a mesh, for the harvest and the stream.

What happens to a block depends on (key, index of the block) alone, wherever it stands and whatever stands beside it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from ..diffusion import corrupt
from ..distributed import row_sharding
from ..errors import UserError
from ..models import DiffusionSpec, Transformer, parse_site, partition_specs, site_rows
from .corruption import Corruption

STRATA = 16  # consecutive blocks whose rates cover the range evenly
PAPER_BATCH = 8  # consecutive blocks with one rate, policy batch_rate


def block_rates(
    policy: str, key: Key[Array, ""], indices: Int[Array, " B"], low: float | Float[Array, ""], high: float | Float[Array, ""]
) -> Float[Array, " B"]:
    """The corruption rate of each block, a function of the key and its index alone."""
    if policy == "clean":
        return jnp.zeros(indices.shape, jnp.float32)
    each = jax.vmap(jax.random.fold_in, (None, 0))
    if policy == "batch_rate":
        place = jax.vmap(jax.random.uniform)(each(key, indices // PAPER_BATCH))
    else:
        orders = jax.vmap(lambda k: jax.random.permutation(k, STRATA))(each(jax.random.fold_in(key, 0), indices // STRATA))
        stratum = jnp.take_along_axis(orders, (indices % STRATA)[:, None], axis=1)[:, 0]
        place = (stratum + jax.vmap(jax.random.uniform)(each(jax.random.fold_in(key, 1), indices))) / STRATA
    return low + (high - low) * place.astype(jnp.float32)


def corrupt_blocks(
    diffusion: DiffusionSpec | None,
    key: Key[Array, ""],
    tokens: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    indices: Int[Array, " B"],
    policy: str,
    low: float | Float[Array, ""],
    high: float | Float[Array, ""],
) -> tuple[Int[Array, "B T"], Bool[Array, "B T"], Float[Array, " B"]]:
    """What the model reads of the blocks with these indices, where that is a mask, and each block's rate; padding is never masked."""
    rate = block_rates(policy, jax.random.fold_in(key, 0), indices, low, high)
    if policy == "clean":
        return tokens, jnp.zeros(tokens.shape, bool), rate
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, 1), indices)
    one = lambda k, t, p, r: corrupt(k, t[None], p, diffusion, protect=~r[None])  # noqa: E731
    corrupted, is_masked = (a[:, 0] for a in jax.vmap(one)(keys, tokens, rate, real))
    return corrupted, is_masked, rate


def taps_of(
    model: Transformer, params: dict, tokens: Int[Array, "B T"], real: Bool[Array, "B T"] | None, sites: tuple[str, ...], dtype: str
) -> dict[str, Float[Array, "B T D"]]:
    """The activations at some sites, rows of ``site_width`` entries in ``dtype``; ``real``: what is not padding, None where all is."""
    out = model.apply(params, tokens, attention_mask=real, logits=False, collect=sites)
    places = {site: parse_site(site, model.config) for site in sites}
    return {site: site_rows(out.taps[name][layer]).astype(dtype) for site, (name, layer) in places.items()}


@partial(jax.jit, static_argnums=0, static_argnames=("sites", "policy", "padded", "dtype"))
def forward(
    model: Transformer,
    params: dict,
    key_data: Int[Array, " words"],
    tokens: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    indices: Int[Array, " B"],
    *,
    low: float,
    high: float,
    sites: tuple[str, ...],
    policy: str,
    padded: bool,
    dtype: str,
) -> tuple[dict[str, Float[Array, "B T D"]], Int[Array, "B T"], Bool[Array, "B T"], Float[Array, " B"]]:
    """Corrupts the blocks and runs the model: taps in ``dtype``, what the model read, where it is masked, the rates.

    On a mesh all of them are divided over its rows, and nothing else.
    """
    key = jax.random.wrap_key_data(key_data)
    corrupted, is_masked, rate = corrupt_blocks(model.diffusion, key, tokens, real, indices, policy, low, high)
    taps = taps_of(model, params, corrupted, real if padded else None, sites, dtype)
    return over_rows((taps, corrupted, is_masked, rate), model.mesh)


def over_rows(tree: Any, mesh: Mesh | None) -> Any:
    """Inside a jitted function: the arrays divided over the mesh's rows along their first dimension."""
    return tree if mesh is None else jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, row_sharding(mesh)), tree)


def key_words(key: Key[Array, ""]) -> Int[np.ndarray, " words"]:
    """A key as numbers, which every process of a mesh can hand to a program."""
    return jax.device_get(jax.random.key_data(key))


def on_mesh(model: Transformer, params: dict, mesh: Mesh | None) -> tuple[Transformer, dict]:
    """The model with its parameters divided over a mesh; as they are where they are divided like that, or where there is no mesh.

    A model that was loaded with a mesh keeps it when ``mesh`` is None.

    Raises:
      UserError: the model lies on another mesh, or its weights cannot be divided like this.
    """
    if mesh is None or model.mesh == mesh:
        return model, params
    if model.mesh is not None:
        raise UserError(f"the model lies on a mesh of {dict(model.mesh.shape)}, {dict(mesh.shape)} was asked for: load it with that mesh")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), partition_specs(params["params"], mesh))
    return model.clone(mesh=mesh), {**params, "params": jax.device_put(params["params"], shardings)}


def check_corruption(model: Transformer, corruption: Corruption, verb: str) -> None:
    """Raises ``UserError`` where an autoregressive model is to read corrupted text."""
    if model.diffusion is None and corruption.policy != "clean":
        raise UserError(f"{verb}: an autoregressive model has no mask token, so {str(corruption)!r} is not possible: use 'clean'")


def check_tokens(model: Transformer, tokens: Int[np.ndarray, "n T"], verb: str) -> None:
    """Raises ``UserError`` where the blocks have tokens that the model does not have."""
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < model.config.vocab_size:
        raise UserError(
            f"{verb}: the blocks have token ids {tokens.min()} to {tokens.max()}, the model has {model.config.vocab_size} entries: "
            "they were made with another tokenizer"
        )
