"""Attention kernels that never hold the scores: cuDNN's on CUDA, splash attention on TPU.

Each comes with a function that says whether it can do a case; what neither can is computed in chunks (``attention.py``). Both
work in 16 bits and know no positions: a causal rule needs ``see.indexed``, and a window that is data is not theirs.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float

from dlmscope_jax.distributed import row_axes, row_parts

from .visibility import Visibility

MIN_LENGTH = 256  # below it the scores are small and a kernel has nothing to save
TILES = (512, 256, 128)  # of splash attention: the largest that divides the tokens


def cudnn_supports(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], see: Visibility, softcap: float | None) -> bool:
    """Whether ``cudnn`` can do this case with the cuDNN and the GPU at hand; False where there is no cuDNN."""
    if q.dtype not in (jnp.bfloat16, jnp.float16) or not _fits(q, k, see) or softcap is not None or see.rule == "block_causal":
        return False
    try:
        devices = jax.local_devices(backend="cuda")
    except RuntimeError:
        devices = []  # compiling for a GPU that is not here
    if any(float(device.compute_capability) < 8 for device in devices):
        return False
    try:  # jax checks widths and versions while it traces
        jax.eval_shape(lambda q, k: cudnn(q, k, k, see, 1.0), q, k)
    except (RuntimeError, ValueError):
        return False
    return True


def cudnn(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], see: Visibility, scale: float
) -> Float[Array, "B T N H"]:
    """cuDNN's fused attention, with its own backward pass.

    cuDNN hides what lies behind a row's length, so padding is sorted to the end: keys have no order of their own in
    bidirectional attention, and in causal attention the queries move with them, which keeps the order of real tokens.
    """
    causal, order, lengths = see.rule == "causal", None, None
    if see.padded:
        hidden = jnp.broadcast_to(see.key < 0, k.shape[:2])
        order = jnp.argsort(hidden, axis=1, stable=True)
        lengths = jnp.maximum(jnp.sum(~hidden, axis=1, dtype=jnp.int32), 1)
        k, v = _rows(k, order), _rows(v, order)
        q = _rows(q, order) if causal else q
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, key_value_seq_lengths=lengths, implementation="cudnn"
    )  # fmt: skip
    return _rows(out, jnp.argsort(order, axis=1)) if causal and order is not None else out


def splash_supports(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], see: Visibility, mesh: Mesh | None) -> bool:
    """Whether ``splash`` can do this case. No compiler can divide the kernel, so several devices need their mesh."""
    if q.dtype != jnp.bfloat16 or not _fits(q, k, see) or q.shape[1] % TILES[-1] or k.shape[1] % TILES[-1]:
        return False
    if mesh is None:
        return jax.device_count() == 1
    heads = mesh.shape.get("model", 1)
    return not (q.shape[0] % row_parts(mesh) or q.shape[2] % heads or k.shape[2] % heads)


def splash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    see: Visibility,
    scale: float,
    softcap: float | None,
    mesh: Mesh | None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Splash attention (``jax.experimental.pallas.ops.tpu``), with its own backward pass; it skips tiles that are all hidden.

    Args:
      q, k, v: heads; the batch lies on the mesh axes ``data`` and ``replica``, heads on ``model``.
      see: which keys each query sees; padding is a second segment.
      scale: multiplies the queries, which are rounded once more.
      softcap: c of ``c tanh(score / c)``, None for none.
      mesh: where the arrays lie, None for one device.
      interpret: run the kernel as plain operations, for tests.
    """
    # imported here: half a second that only this path needs
    from jax.experimental.pallas.ops.tpu import splash_attention as library

    class BlockCausal(library.Mask):
        """Own block and those before, made tile by tile; masks are compared so that equal tiles are stored once."""

        shape = (q.shape[1], k.shape[1])

        def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
            query, key = (np.arange(size)[part] // see.block_length for size, part in zip(self.shape, index, strict=True))
            return key[None, :] <= query[:, None]

        def __eq__(self, other: object) -> bool:
            return isinstance(other, BlockCausal)

        def __hash__(self) -> int:
            return hash(BlockCausal)

    shape = (q.shape[1], k.shape[1])
    masks = {"causal": library.CausalMask, "block_causal": lambda _: BlockCausal(), "bidirectional": library.FullMask}
    tile_q, tile_k = (next(tile for tile in TILES if size % tile == 0) for size in shape)
    sizes = library.BlockSizes(
        block_q=tile_q, block_kv=tile_k, block_q_dkv=tile_q, block_kv_dkv=tile_k, block_q_dq=tile_q, block_kv_dq=tile_k
    )  # fmt: skip

    def run(q: Array, k: Array, v: Array, key: Array) -> Array:
        heads = library.MultiHeadMask([masks[see.rule](shape)] * q.shape[2])
        kernel = library.make_splash_mha(
            heads, block_sizes=sizes, attn_logits_soft_cap=softcap, head_shards=1, q_seq_shards=1, interpret=interpret
        )  # fmt: skip
        segments = None
        if see.padded:
            hidden = jnp.broadcast_to(key < 0, k.shape[:2]).astype(jnp.int32)
            segments = library.SegmentIds(q=jnp.zeros(q.shape[:2], jnp.int32), kv=hidden)
        q, k, v = ((a * factor).astype(a.dtype).swapaxes(1, 2) for a, factor in ((q, scale), (k, 1), (v, 1)))
        return jax.vmap(kernel)(q, k, v, segments).swapaxes(1, 2)

    if mesh is None:
        return run(q, k, v, see.key)
    batch, model = row_axes(mesh), "model" if "model" in mesh.axis_names else None
    heads = PartitionSpec(batch, None, model)
    rows = PartitionSpec(batch if see.key.shape[0] > 1 else None)
    return jax.shard_map(run, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(q, k, v, see.key)


def _fits(q: Array, k: Array, see: Visibility) -> bool:
    in_order = see.rule == "bidirectional" or (see.indexed and q.shape[1] == k.shape[1])
    return in_order and see.window is None and min(q.shape[1], k.shape[1]) >= MIN_LENGTH


def _rows(x: Array, order: Array) -> Array:
    return jnp.take_along_axis(x, order[:, :, None, None], axis=1)
