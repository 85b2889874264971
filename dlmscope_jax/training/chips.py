"""What accelerators can do at most, from their makers' tables: nothing here was measured."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device, as jax counts them.

    Attributes:
      name: what people call it.
      kinds: beginnings of what jax calls it, ``device.device_kind``.
      platform: as kernels choose by it.
      memory: bytes.
      bfloat16, float32: FLOP/s of products of such factors; float32 at the highest precision, on a TPU six passes of bfloat16.
      bandwidth: bytes/s between memory and chip.
      ring: bytes/s that a chip sends around a ring along one mesh axis: on a TPU over one link each way, on NVLink over all of them.
    """

    name: str
    kinds: tuple[str, ...]
    platform: str
    memory: float
    bfloat16: float
    float32: float
    bandwidth: float
    ring: float


def _tpu(name: str, kinds: tuple[str, ...], gigabytes: float, teraflops: float, bandwidth: float, link: float) -> Chip:
    """``link``: GB/s of one link in one direction, of which a ring uses two."""
    return Chip(name, kinds, "tpu", gigabytes * 1e9, teraflops * 1e12, teraflops * 1e12 / 6, bandwidth * 1e9, 2 * link * 1e9)


def _gpu(name: str, kinds: tuple[str, ...], gigabytes: float, teraflops: float, float32: float, bandwidth: float, nvlink: float) -> Chip:
    """``nvlink``: GB/s in one direction."""
    return Chip(name, kinds, "cuda", gigabytes * 1e9, teraflops * 1e12, float32 * 1e12, bandwidth * 1e9, nvlink * 1e9)


# TPUs: "System architecture" of each version at docs.cloud.google.com/tpu/docs; a link is the chip's bidirectional bandwidth over twice its
# links (v4, v5p: 6; v5e, v6e: 4). GPUs: NVIDIA's data sheets of the SXM modules, without sparsity; float32 outside of tensor cores.
CHIPS = (
    _tpu("TPU v4", ("TPU v4",), 32, 275, 1228, 50),
    _tpu("TPU v5e", ("TPU v5 lite", "TPU v5e"), 16, 197, 819, 50),
    _tpu("TPU v5p", ("TPU v5",), 95, 459, 2765, 100),
    _tpu("TPU v6e", ("TPU v6 lite", "TPU v6e"), 32, 918, 1640, 100),
    _gpu("A100", ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB"), 80, 312, 19.5, 2039, 300),
    _gpu("H200", ("NVIDIA H200",), 141, 989, 67, 4800, 450),
    _gpu("H100", ("NVIDIA H100 80GB", "NVIDIA H100"), 80, 989, 67, 3350, 450),
    _gpu("B200", ("NVIDIA B200",), 180, 2250, 75, 7700, 900),
)


def chip_of(kind: str) -> Chip | None:
    """The row of a ``device_kind``, None where it is not in the table."""
    fits = [(len(start), chip) for chip in CHIPS for start in chip.kinds if kind.startswith(start)]
    return max(fits, key=lambda fit: fit[0])[1] if fits else None
