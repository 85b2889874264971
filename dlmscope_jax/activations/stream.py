"""Training rows straight from the model: no store, and no activation that leaves the devices.

A buffer on the devices holds rows that wait to be mixed. The host plans which rows are kept where and which make the next batch
(``mixing.py``): it knows the masks, which need no model. It then starts, without waiting, a forward pass every few steps that writes its
rows into free places of the buffer, and for each step a program that takes a batch out of it. On a mesh a row stays on the part of the
mesh's rows where it was computed, so that neither moves rows between devices.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from .. import distributed
from ..data import Blocks
from ..errors import UserError
from ..models import Transformer, canonical_site, site_width
from .corruption import Corruption
from .forward import check_corruption, check_tokens, corrupt_blocks, key_words, on_mesh, taps_of
from .harvesting import origin_of
from .mixing import Fill, Mixer, Order
from .reader import Select

LANES = 256  # at most
BUFFER_ROWS = 1 << 18
_IN_FLIGHT = 2  # forward passes that nobody has waited for: more would pile up
_ROOM = 1 / 8  # more than the first epoch needs, where later epochs may need more
_AT_ONCE = 1 << 20  # positions whose masks are drawn together


class ActivationStream:
    """The activations of a model over token blocks, for ``train`` in place of a store: epochs without end, new masks in each.

    The rows of the first epoch are those of ``harvest`` with the same seed. Batches depend on the blocks, the settings here, the batch
    size and the seed of the training, and not on the mesh but for the rounding of the forward pass.

    Attributes:
      sites: width of the rows of each site.
      meta: what a store of these rows would say of them.
      identity: changes when rows or their order do.
    """

    def __init__(
        self,
        model: Transformer,
        params: dict,
        blocks: Blocks,
        sites: Sequence[str],
        corruption: Corruption,
        seed: int = 0,
        batch_size: int = 32,
        buffer_rows: int = BUFFER_ROWS,
        mesh: Mesh | None = None,
        meta: Mapping[str, Any] | None = None,
        dtype: str = "bfloat16",
    ):
        """Args:
          model, params: the language model.
          blocks: token blocks [n, T].
          sites: ``("resid_post@3", ...)``, aliases accepted.
          corruption: which tokens the model does not see; must be ``clean`` for an autoregressive model.
          seed: of rates and masks.
          batch_size: blocks of a forward pass. The greatest common divisor of it, the training's batch size and 256 is the number of
            lanes, which the mesh's rows must divide.
          buffer_rows: rows that wait on all devices together, about; a batch mixes rows of twice as many. At least those of one pass.
          mesh: the devices to run on (default: those that the model was loaded to).
          meta: more about the rows, such as the model's name and the tokenizer's digest.
          dtype: of the rows: ``bfloat16``, ``float16`` or ``float32``.

        Raises:
          UserError: an unknown site; corruption of an autoregressive model; tokens that the model does not have; numbers out of range.
        """
        names = tuple(sorted({canonical_site(site, model.config) for site in sites}))
        if not names:
            raise UserError('a stream needs at least one site, such as "resid_post@3"')
        if not isinstance(blocks, Blocks):
            raise UserError("a stream shuffles its blocks and needs all of them at once: read them into memory, or harvest a store")
        for name, value, least in (("seed", seed, 0), ("batch_size", batch_size, 1), ("buffer_rows", buffer_rows, 1)):
            if value < least:
                raise UserError(f"stream: {name} is {value}: it must be at least {least}")
        if dtype not in ("bfloat16", "float16", "float32"):
            raise UserError(f"stream: dtype {dtype!r} is not known: use bfloat16, float16 or float32")
        check_corruption(model, corruption, "stream")
        if not (blocks.documents >= 0).any():
            raise UserError("stream: there are no blocks with text in them")
        check_tokens(model, blocks.tokens, "stream")
        self.sites = {name: site_width(name, model.config) for name in names}
        self._model, self._params = on_mesh(model, params, mesh)
        self._blocks, self._corruption, self._seed = blocks, corruption, seed
        self._batch_size, self._buffer_rows, self._dtype = batch_size, buffer_rows, dtype
        self.meta = origin_of(self._model, self._params, blocks, names, corruption, seed, dtype, meta)
        what = {name: value for name, value in self.meta.items() if name != "versions"} | {"stream": [batch_size, buffer_rows]}
        self.identity = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def mesh(self) -> Mesh | None:
        """The devices that the rows are on."""
        return self._model.mesh

    def batches(
        self, batch_size: int, seed: int, start_step: int = 0, sites: Sequence[str] | None = None, select: Select = "all"
    ) -> "StreamBatches":
        """Batches from a step on, ``{site: [batch_size, D]}`` on the devices, divided over the mesh's rows; equal for an equal step.

        The first batch waits for as many forward passes as fill the buffer, or were in it where ``start_step`` is not 0.

        Args:
          batch_size: rows of a batch, on all devices together.
          seed: of the order of blocks and rows.
          start_step: first step.
          sites: which to compute, default all.
          select: ``all`` rows; those the model read ``masked`` or ``visible``; those that are ``predicting`` a masked token.

        Raises:
          UserError: no such site; no row is selected; the mesh does not divide the batches; the buffer holds less than one pass.
        """
        names = tuple(self.sites if sites is None else sites)
        if unknown := [name for name in names if name not in self.sites]:
            raise UserError(f"the stream has no site {unknown[0]!r}: it has {', '.join(self.sites)}")
        if select not in get_args(Select):
            raise UserError(f"stream: select {select!r} is not known: use one of {', '.join(get_args(Select))}")
        lanes = math.gcd(LANES, self._batch_size, batch_size)
        parts = 1 if self._model.mesh is None else distributed.row_parts(self._model.mesh)
        if lanes % parts:
            raise UserError(
                f"stream: the {parts} parts of the mesh's rows do not divide the {lanes} lanes: use a batch_size of the stream "
                f"({self._batch_size}) and of the training ({batch_size}) that are both multiples of {parts}"
            )
        chosen = _Selection(self._model, self._blocks, self._corruption, self._seed, select)
        passes = -(-len(self._blocks) // self._batch_size)
        rows = int(chosen.counts(0).sum())
        if rows < batch_size:
            raise UserError(
                f"stream: an epoch has {rows} rows to select as {select!r} under the corruption {str(self._corruption)!r}: fewer than one "
                f"batch of {batch_size}"
            )
        # while rows leave over ``span`` passes, (span + 1) / 2 of them wait; never much more than an epoch
        span = min(2 * self._buffer_rows * passes // rows - 1, 2 * passes - 1)
        if span < 1:
            raise UserError(
                f"stream: buffer_rows is {self._buffer_rows}, less than the {-(-rows // passes)} rows of one forward pass: raise it, "
                "or lower the stream's batch_size"
            )
        order = Order(chosen.counts, chosen.selected, self._blocks.tokens.shape[1], self._batch_size, lanes, span, seed)
        share = batch_size // lanes
        # as much as the first two epochs need at any time
        capacity = order.capacity(share, max(2 * passes - order.first, 1))
        if not chosen.regular:
            capacity += math.ceil(capacity * _ROOM)
        mixer = Mixer(order, share, start_step, capacity)
        return StreamBatches(self._model, self._params, self._blocks, {n: self.sites[n] for n in names}, chosen, mixer, self._dtype, rows)


class StreamBatches:
    """Batches in the order of their steps; made by ``ActivationStream.batches``.

    Attributes:
      rows: selected rows of the first epoch.
      capacity: rows that the buffer has room for.
    """

    def __init__(
        self,
        model: Transformer,
        params: dict,
        blocks: Blocks,
        sites: dict[str, int],
        chosen: "_Selection",
        mixer: Mixer,
        dtype: str,
        rows: int,
    ):
        self.rows = rows
        self._model, self._params, self._blocks, self._sites, self._chosen, self._mixer = model, params, blocks, sites, chosen, mixer
        self._dtype, self._padded = dtype, bool((blocks.documents < 0).any())
        self._room = mixer.capacity
        self._running: deque[Array] = deque()
        self._buffers = _empty(self._shapes(), model.mesh)

    @property
    def capacity(self) -> int:
        """Rows that the buffer has room for, on all devices together."""
        return self._room * self._mixer.lanes

    def __iter__(self) -> "StreamBatches":
        return self

    def __next__(self) -> dict[str, Float[Array, "B D"]]:
        fills, slots = next(self._mixer)
        if self._mixer.capacity > self._room:  # a later epoch that needs more than the first ones did
            before, self._room = self._room, self._mixer.capacity
            self._buffers = _grown(self._buffers, before, self._room, self._model.mesh)
        for fill in fills:
            self._start(fill)
        places = (np.arange(self._mixer.lanes)[:, None] * self._room + slots).astype(np.int32).reshape(-1)
        return _taken(self._buffers, self._fed(places), self._model.mesh)

    def close(self) -> None:
        """Lets the buffer go."""
        self._buffers = {}

    def _start(self, fill: Fill) -> None:
        """Starts a forward pass that writes its rows into the buffer."""
        window, length = fill.window, self._blocks.tokens.shape[1]
        blocks = np.maximum(window.blocks, 0)  # block 0 where there is none: no row of it is kept
        tokens = self._chosen.corrupted(window.epoch, blocks)
        real = self._blocks.documents[blocks] >= 0
        places = np.full(len(blocks) * length, self._mixer.lanes * self._room, np.int32)  # outside: not kept
        kept = fill.slot >= 0
        places[window.row[kept]] = window.lane[kept] * self._room + fill.slot[kept]
        while len(self._running) >= _IN_FLIGHT:
            self._running.popleft().block_until_ready()
        self._buffers, done = _filled(
            self._model, self._params, self._buffers, *map(self._fed, (tokens, real, places)), padded=self._padded, dtype=self._dtype
        )  # fmt: skip
        self._running.append(done)

    def _fed(self, array: np.ndarray) -> Any:
        """A whole array, of which a process hands its own rows to its devices."""
        if (mesh := self._model.mesh) is None:
            return array
        index, count = distributed.local_rows(mesh)
        return distributed.to_global(array.reshape(count, -1, *array.shape[1:])[index], mesh)

    def _shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {site: jax.ShapeDtypeStruct((self.capacity, width), jnp.dtype(self._dtype)) for site, width in self._sites.items()}


class _Selection:
    """Which tokens of each epoch the model does not see, and which of its rows are wanted; on the host, for all blocks."""

    def __init__(self, model: Transformer, blocks: Blocks, corruption: Corruption, seed: int, select: Select):
        self._model, self._blocks, self._corruption, self._seed, self._select = model, blocks, corruption, seed, select
        self._real = blocks.documents >= 0
        self._bits = lru_cache(maxsize=2)(self._draw)  # an epoch and the next one
        self.regular = select == "all" and bool(self._real.all())  # every block has equally many rows

    def counts(self, epoch: int) -> Int[np.ndarray, " n"]:
        """Wanted rows of each block."""
        if self._select == "all":
            return self._real.sum(axis=1)
        step = max(1, _AT_ONCE // self._real.shape[1])
        parts = (np.arange(first, min(first + step, len(self._real))) for first in range(0, len(self._real), step))
        return np.concatenate([self.selected(epoch, part).sum(axis=1) for part in parts])

    def selected(self, epoch: int, blocks: Int[np.ndarray, " k"]) -> Bool[np.ndarray, "k T"]:
        """The wanted rows of some blocks, none of block -1."""
        real = self._real[blocks] & (blocks >= 0)[:, None]
        if self._select == "all":
            return real
        masked = self._masked(epoch, blocks)
        if self._select == "predicting" and self._model.diffusion is not None and self._model.diffusion.shift:
            masked = np.concatenate([masked[:, 1:], np.zeros((len(masked), 1), bool)], axis=1)
        return real & (~masked if self._select == "visible" else masked)

    def corrupted(self, epoch: int, blocks: Int[np.ndarray, " k"]) -> Int[np.ndarray, "k T"]:
        """What the model reads of some blocks."""
        tokens = self._blocks.tokens[blocks]
        if self._corruption.policy == "clean" or self._model.diffusion is None:
            return tokens
        return np.where(self._masked(epoch, blocks), np.int32(self._model.diffusion.mask_id), tokens)

    def _masked(self, epoch: int, blocks: np.ndarray) -> np.ndarray:
        if self._corruption.policy == "clean":
            return np.zeros((len(blocks), self._real.shape[1]), bool)
        return np.unpackbits(self._bits(epoch)[blocks], axis=1, count=self._real.shape[1]).astype(bool)

    def _draw(self, epoch: int) -> np.ndarray:
        """The masks of an epoch as bits: the harvest's in the first one, others in each later one."""
        n, length = self._real.shape
        step = min(n, max(1, _AT_ONCE // length))
        key = jax.random.key(self._seed)
        words = key_words(jax.random.fold_in(key, epoch + 1) if epoch else key)
        found = []
        for first in range(0, n, step):
            blocks = np.minimum(np.arange(first, first + step), n - 1).astype(np.int32)  # one shape, one program
            bits = _mask_bits(
                self._model.diffusion, words, self._blocks.tokens[blocks], self._real[blocks], blocks,
                low=self._corruption.low, high=self._corruption.high, policy=self._corruption.policy,
            )  # fmt: skip
            found.append(jax.device_get(bits)[: n - first])
        return np.concatenate(found)


@partial(jax.jit, static_argnums=0, static_argnames="policy")
def _mask_bits(diffusion: Any, key: Array, tokens: Array, real: Array, indices: Array, *, low: float, high: float, policy: str) -> Array:
    _, is_masked, _ = corrupt_blocks(diffusion, jax.random.wrap_key_data(key), tokens, real, indices, policy, low, high)
    return jnp.packbits(is_masked, axis=1)


@partial(jax.jit, static_argnums=0, donate_argnums=2, static_argnames=("padded", "dtype"))
def _filled(
    model: Transformer,
    params: dict,
    buffers: dict[str, Float[Array, "R D"]],
    tokens: Int[Array, "B T"],
    real: Bool[Array, "B T"],
    places: Int[Array, " BT"],
    *,
    padded: bool,
    dtype: str,
) -> tuple[dict[str, Float[Array, "R D"]], Array]:
    """The buffers with the rows of a forward pass at their places, and something to wait for that is not given away."""
    taps = taps_of(model, params, tokens, real if padded else None, tuple(buffers), dtype)
    rows = {site: tap.reshape(-1, tap.shape[-1]) for site, tap in taps.items()}

    def write(buffer: Array, rows: Array, places: Array) -> Array:
        return buffer.at[_own(places, buffer, model.mesh)].set(rows, mode="drop")

    write = _by_rows(write, 3, model.mesh)
    return {site: write(buffer, rows[site], places) for site, buffer in buffers.items()}, jnp.sum(places[:1])


@partial(jax.jit, static_argnames="mesh")
def _taken(buffers: dict[str, Array], places: Int[Array, " B"], mesh: Mesh | None) -> dict[str, Float[Array, "B D"]]:
    """The rows of a batch, each from the device that holds it."""
    take = _by_rows(lambda buffer, places: buffer[_own(places, buffer, mesh)], 2, mesh)
    return {site: take(buffer, places) for site, buffer in buffers.items()}


@partial(jax.jit, static_argnames=("before", "after", "mesh"))
def _grown(buffers: dict[str, Array], before: int, after: int, mesh: Mesh | None) -> dict[str, Array]:
    """Buffers whose lanes have room for more rows."""

    def grow(buffer: Array) -> Array:
        lanes = buffer.reshape(-1, before, buffer.shape[1])
        return jnp.pad(lanes, ((0, 0), (0, after - before), (0, 0))).reshape(-1, buffer.shape[1])

    return {site: _by_rows(grow, 1, mesh)(buffer) for site, buffer in buffers.items()}


def _empty(shapes: dict[str, jax.ShapeDtypeStruct], mesh: Mesh | None) -> dict[str, Array]:
    """Buffers, divided over the mesh's rows; no device ever holds a whole one."""
    sharding = None if mesh is None else distributed.row_sharding(mesh)
    make = lambda: {site: jnp.zeros(shape.shape, shape.dtype) for site, shape in shapes.items()}  # noqa: E731
    return jax.jit(make, out_shardings=sharding)()


def _own(places: Int[Array, " n"], buffer: Float[Array, "r D"], mesh: Mesh | None) -> Int[Array, " n"]:
    """Places as rows of this part of the buffer; those that are not in it lie after its end."""
    size = buffer.shape[0]
    first = 0 if mesh is None else jax.lax.axis_index(distributed.row_axes(mesh)) * size
    return jnp.where((places >= first) & (places < first + size), places - first, size)


def _by_rows(f: Any, arguments: int, mesh: Mesh | None) -> Any:
    """``f`` on each part of the mesh's rows by itself."""
    if mesh is None:
        return f
    rows = PartitionSpec(distributed.row_axes(mesh))
    return jax.shard_map(f, mesh=mesh, in_specs=(rows,) * arguments, out_specs=rows, check_vma=False)
