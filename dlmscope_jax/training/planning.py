"""What one step costs a device, by formula: arithmetic, memory traffic, and what devices send each other.

A compiler counts the body of a loop once, so these are counted here, times the trips; its word is taken for memory alone. The formulas
are compared with compiled programs in tests/training/test_planning.py, on virtual devices, and for TPUs by ``scripts/test --aot``.

Left out, because it is small beside the rest: norms, rotations and softmax, masks, scalars, the columns of a batch.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from dlmscope_jax.dictionaries import BatchTopK, Binary, Gated, Matryoshka, TopK
from dlmscope_jax.kernels.dispatch import Problem
from dlmscope_jax.kernels.sparse_matmul.products import sparse_wins
from dlmscope_jax.models import ModelConfig, Transformer

from .chips import Chip
from .spec import TrainSpec

_F32 = 4
# bytes of optimiser traffic a parameter: gradient read, weight and moments read and written
_TRAFFIC = {"adam": 28, "adam_bf16": 20, "lion": 20, "signum": 20, "muon": 20, "schedule_free": 28}
# of optimiser state
OPTIMISER = {"adam": 8, "adam_bf16": 4, "lion": 4, "signum": 4, "muon": 4, "schedule_free": 8}


@dataclasses.dataclass(frozen=True)
class Collective:
    """Some equal collectives of a step.

    Attributes:
      what: in words.
      op: its name in a compiled program.
      axis: the mesh axis that it runs over.
      parts: devices along it.
      count: how often it happens in a step.
      bytes: that one device gives to one of them.
    """

    what: str
    op: str
    axis: str
    parts: int
    count: float
    bytes: int

    def seconds(self, chip: Chip) -> float:
        """All of them, on a ring: what a device gives goes past all others, in a sum once to add up and once to tell the result."""
        sent = self.bytes * (self.parts - 1) if self.op == "all-gather" else 2 * self.bytes * (self.parts - 1) / self.parts
        return self.count * sent / chip.ring


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a step costs one device.

    Attributes:
      bfloat16, float32: floating-point operations of products of such factors.
      bytes: between memory and chip.
      collectives: what it sends.
    """

    bfloat16: float
    float32: float
    bytes: float
    collectives: tuple[Collective, ...] = ()

    @property
    def flops(self) -> float:
        """Of both kinds."""
        return self.bfloat16 + self.float32

    @property
    def sent(self) -> float:
        """Bytes that a device gives to collectives."""
        return sum(c.count * c.bytes for c in self.collectives)

    def seconds(self, chip: Chip) -> float:
        """The roofline: arithmetic beside traffic at the maker's peaks, then the collectives, none of which hides behind another."""
        computing = self.bfloat16 / chip.bfloat16 + self.float32 / chip.float32
        return max(computing, self.bytes / chip.bandwidth) + sum(c.seconds(chip) for c in self.collectives)


@dataclasses.dataclass(frozen=True)
class Parts:
    """Into how many parts a mesh divides things: rows (over ``data``), copies of the whole (``replica``), latents and heads (``model``)."""

    data: int = 1
    model: int = 1
    replica: int = 1

    @property
    def rows(self) -> int:
        """Parts of the rows."""
        return self.data * self.replica

    @property
    def devices(self) -> int:
        """All of them."""
        return self.rows * self.model


def parameters_here(spec: TrainSpec, parts: Parts) -> int:
    """How many of a dictionary's learned parameters one device holds."""
    dictionary = spec.dictionary
    axes = dictionary.axes()
    here = {name: math.prod(shape) // (parts.model if "latent" in axes[name] else 1) for name, shape in dictionary.shapes().items()}
    return sum(size for name, size in here.items() if name not in dictionary.STATISTICS)


def state_bytes(spec: TrainSpec, parts: Parts) -> tuple[int, int]:
    """Bytes that a device holds of a training's state: parameters, and what the optimiser, an average and the counters add."""
    here = parameters_here(spec, parts)
    counters = spec.dictionary.width // parts.model * 4
    return here * _F32, here * (OPTIMISER[spec.optimizer] + (_F32 if spec.ema is not None else 0)) + counters


def step_cost(spec: TrainSpec, parts: Parts, platform: str, aux: bool = False) -> Cost:
    """A step of a dictionary's training.

    Dense: five products of 2 B D N (codes, reconstruction, gradient of the codes, of both weights). With k active latents the last four
    take B k D where that is less work than it costs to gather (reference/sae_libraries.md 4.2).

    Args:
      spec: the training.
      parts: of the mesh.
      platform: ``"tpu"``, ``"cuda"`` or ``"cpu"``: where sparse products are used differs.
      aux: whether latents are dead, so that AuxK is at work in the step.
    """
    dictionary: Any = spec.dictionary
    micro = spec.micro_batches
    b, n = spec.batch_size // parts.rows // micro, dictionary.width // parts.model
    d, e, here = dictionary.d_in, dictionary.out, parameters_here(spec, parts)
    low = high = 0.0
    moved = 2.0 * _F32 * b * n  # pre-activations, written and read
    encoder = 2.0 * b * n * d
    if getattr(dictionary, "selection", "float32") == "bfloat16":
        low += encoder
    else:
        high += encoder
    active = _active(dictionary, n, parts)
    if active is not None and sparse_wins(Problem(b, n, active, d), platform):
        high += 2.0 * b * active * (3 * e + d)
        moved += _F32 * b * active * (3 * e + d)
    else:
        high += 2.0 * b * n * (3 * e + d)
        moved += _F32 * (2.0 * n * (d + e) + 4.0 * b * n)
    if isinstance(dictionary, Gated):  # the gate's reconstruction, by a frozen decoder
        high += 2.0 * b * n * 2 * e
    if isinstance(dictionary, Binary) and spec.settings_used.covariance > 0:
        high += 4.0 * b * b * n * parts.rows if b * parts.rows < n else 4.0 * b * n * n * parts.model
    if aux and spec.settings_used.aux > 0 and hasattr(dictionary, "aux_count"):
        used = min(dictionary.aux_count, n)
        high += 10.0 * b * used * d
        moved += 8.0 * _F32 * b * used
    low, high, moved = low * micro, high * micro, moved * micro
    moved += here * (_TRAFFIC[spec.optimizer] + _F32 + 2 * _F32 * (micro - 1)) + (2 * _F32 * here if spec.ema is not None else 0)
    return Cost(low, high, moved, tuple(_of_step(spec, parts, b, n, here, aux)))


def _active(dictionary: Any, n: int, parts: Parts) -> int | None:
    """Active latents of a row that a device works with, None where all are."""
    k = getattr(dictionary, "k", None)
    if k is None:
        return None
    if isinstance(dictionary, BatchTopK | Matryoshka):
        return max(1, k // parts.model)
    return min(n, (4 * k if getattr(dictionary, "multi_topk", False) else k))


def _of_step(spec: TrainSpec, parts: Parts, b: int, n: int, here: int, aux: bool) -> list[Collective]:
    dictionary: Any = spec.dictionary
    found = []
    if parts.model > 1:
        over = ("model", parts.model, spec.micro_batches)
        sums = len(dictionary.prefixes or (1,)) if isinstance(dictionary, Matryoshka) else 1
        sums += int(isinstance(dictionary, Gated)) + int(getattr(dictionary, "multi_topk", False))
        if isinstance(dictionary, TopK) and dictionary.rule != "groups":
            found.append(_over(*over, "candidates of the k largest", "all-gather", _F32 * b * min(dictionary.k, n)))
            if dictionary.multi_topk:
                found.append(_over(*over, "candidates of the 4 k largest", "all-gather", _F32 * b * min(4 * dictionary.k, n)))
        found.append(_over("model", parts.model, spec.micro_batches * sums, "reconstructions", "all-reduce", _F32 * b * dictionary.out))
        if dictionary.centred:
            found.append(_over(*over, "gradient of the bias before encoding", "all-reduce", _F32 * dictionary.d_in))
        if aux and spec.settings_used.aux > 0 and hasattr(dictionary, "aux_count"):
            found.append(_over(*over, "candidates of AuxK", "all-gather", _F32 * b * min(dictionary.aux_count, n)))
            found.append(_over(*over, "reconstruction by AuxK", "all-reduce", _F32 * b * dictionary.out))
    if isinstance(dictionary, BatchTopK | Matryoshka) and parts.devices > 1:
        found.append(_over("all", parts.devices, 8 * spec.micro_batches, "counts above the batch's threshold", "all-reduce", 15 * 4))
    if parts.rows > 1:
        axis = "data" if parts.replica == 1 else "replica, data"
        found.append(_over(axis, parts.rows, 1, "gradients", "all-reduce", _F32 * here))
        found.append(_over(axis, parts.rows, spec.micro_batches, "rows in which latents fired", "all-reduce", 4 * n))
        found.append(_over(axis, parts.rows, spec.micro_batches, "mean of the rows", "all-reduce", _F32 * dictionary.out))
    return found


def _over(axis: str, parts: int, count: int, what: str, op: str, size: int) -> Collective:
    return Collective(what, op, axis, parts, count, size)


def step_memory(spec: TrainSpec, parts: Parts) -> float:
    """Bytes of a step's temporary arrays, up to a factor: by which they grow and shrink with what is changed, no more.

    The gradients (twice with several micro-batches), pre-activations and what remains of them, candidates, some arrays like the rows.
    """
    b, n = spec.batch_size // parts.rows // spec.micro_batches, spec.dictionary.width // parts.model
    gradients = _F32 * parameters_here(spec, parts) * (1 if spec.micro_batches == 1 else 2)
    k = min(n, getattr(spec.dictionary, "k", n))
    return gradients + _F32 * b * (2.0 * n + 4.0 * k + 6.0 * (spec.dictionary.d_in + spec.dictionary.out))


def item_size(model: Transformer) -> int:
    """Bytes of a number as the model computes."""
    return jnp.dtype(model.dtype).itemsize


def block_parameters(config: ModelConfig) -> int:
    """Parameters of the products of one block."""
    heads, mlp = config.head_dim * (2 * config.n_heads + 2 * config.n_kv_heads), config.d_mlp * (3 if config.gated else 2)
    return config.d_model * (heads + mlp)


def forward_cost(model: Transformer, sequences: int, length: int, layers: int, parts: Parts, platform: str) -> Cost:
    """The model over ``sequences`` blocks of ``length`` tokens, through its first ``layers`` blocks, without logits.

    A token takes 2 FLOPs a parameter and 4 T D of attention in each block (half of it where kernels leave out what causal attention masks).
    Weights are gathered over ``data`` block by block; over ``model`` two [B, T, D] are added up in each block.
    """
    config = model.config
    size = item_size(model)
    tokens = max(1, sequences // parts.rows) * length
    weights = block_parameters(config)
    seen = 0.5 if config.attention == "causal" and platform != "cpu" else 1.0
    attention = 4.0 * length * config.n_heads * config.head_dim * seen
    flops = tokens * layers * (2.0 * weights + attention) / parts.model
    read = layers * (size * weights / parts.model * (2 if parts.data > 1 else 1))
    kept = size * tokens * layers * (8.0 * config.d_model + (6.0 * config.n_heads * config.head_dim + 4.0 * config.d_mlp) / parts.model)
    found = []
    if parts.data > 1:
        per_block = size * weights // (parts.model * parts.data)
        found.append(Collective("weights of a block", "all-gather", "data", parts.data, layers, per_block))
        table = size * config.vocab_size * config.d_model // (parts.model * parts.data)
        found.append(Collective("embedding", "all-gather", "data", parts.data, 1, table))
    if parts.model > 1:
        row = size * tokens * config.d_model
        per_block = 1 if config.parallel else 2
        found.append(Collective("outputs of attention and MLP", "all-reduce", "model", parts.model, per_block * layers, row))
        found.append(Collective("embedded tokens", "all-reduce", "model", parts.model, 1, row))
    low, high = (flops, 0.0) if size == 2 else (0.0, flops)
    return Cost(low, high, read + kept, tuple(found))


def forward_memory(model: Transformer, sequences: int, length: int, taps: int, parts: Parts) -> float:
    """Bytes of a forward pass's temporary arrays, up to a factor, as ``step_memory``."""
    config = model.config
    tokens = max(1, sequences // parts.rows) * length
    gathered = 4.0 * block_parameters(config) / parts.model if parts.data > 1 else 0.0
    inside = (3 * config.n_heads * config.head_dim + 3 * config.d_mlp) / parts.model
    return gathered + 2.0 * tokens * ((taps + 4) * config.d_model + inside)
