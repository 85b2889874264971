"""Integer keys in the total order of the floats: -NaN < -inf < ... < -0.0 < 0.0 < ... < inf < NaN.

Selections compare keys where a comparison of floats would not do: that one knows no order for NaN and holds 0.0 and -0.0 for
equal. The bits of a float above zero are in order already; those of a float below zero run backwards, and are turned round.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
SIGNED = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}


def bits(dtype) -> int:
    """The width of a key."""
    return 8 * jnp.dtype(dtype).itemsize


def _sign(dtype) -> np.unsignedinteger:
    return np.dtype(dtype).type(1 << (bits(dtype) - 1))


def sortable(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Unsigned keys of the same width: ``sortable(a) < sortable(b)`` as a comes before b in the total order."""
    raw = jax.lax.bitcast_convert_type(x, UNSIGNED[x.dtype.itemsize])
    sign = _sign(raw.dtype)
    return jnp.where(raw >= sign, ~raw, raw | sign)


def signed(x: Float[Array, "*shape"]) -> Int[Array, "*shape"]:
    """Signed keys of the same width and order: an involution on the bits, one operation less than ``sortable``."""
    return _flip(jax.lax.bitcast_convert_type(x, SIGNED[x.dtype.itemsize]))


def unsortable(key: Int[Array, "*shape"], dtype) -> Float[Array, "*shape"]:
    """The floats of keys, unsigned ones from ``sortable`` or signed ones from ``signed``, bit for bit."""
    if jnp.issubdtype(key.dtype, jnp.signedinteger):
        return jax.lax.bitcast_convert_type(_flip(key), dtype)
    sign = _sign(key.dtype)
    return jax.lax.bitcast_convert_type(jnp.where(key >= sign, key ^ sign, ~key), dtype)


def _flip(raw: Array) -> Array:
    return jnp.where(raw < 0, raw ^ jnp.iinfo(raw.dtype).max, raw)
