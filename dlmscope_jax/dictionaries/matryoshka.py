"""Matryoshka BatchTopK dictionaries: every prefix of the latents must reconstruct on its own, so that early ones stay general.

loss = mean_g |x - (b_dec + sum_{i < n_g} f_i W_dec,i)|^2 + AuxK       (Bussmann et al. 2025, arXiv 2503.17547)

One code, chosen over the whole batch and all latents, serves every prefix. The mean is taken once, so AuxK weighs as much as it
does in ``TopK`` (dictionary_learning divides by G twice: reference/sae_libraries.md 1, defect 7).

Prefixes are of all latents. Where those are divided, each device decodes its part of what every prefix adds to the one before, and the
[G, B, D] parts are summed over the devices at once: G B D numbers, where BatchTopK moves B D.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from dlmscope_jax import kernels
from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.axes import Axes

from .base import RowNorm
from .batch_topk import BatchTopK


@dataclass(frozen=True)
class Matryoshka(BatchTopK):
    """A BatchTopK dictionary whose loss is taken over nested prefixes; its encoder and its files are those of ``BatchTopK``.

    Attributes:
      prefixes: ascending numbers of latents, the last one ``width``; empty: about 1/32, 3/32, 7/32, 15/32 and 1 of the width (the
        paper's nesting).

    Raises:
      UserError: what ``BatchTopK`` raises; prefixes that do not ascend to ``width``.
    """

    d_in: int
    width: int
    k: int
    d_out: int | None = None
    skip: bool = False
    k_aux: int | None = None
    prefixes: tuple[int, ...] = ()
    selection: kernels.Selection = "float32"
    input_bias: bool = False
    subtract: bool = True
    row_norm: RowNorm = "none"

    KIND: ClassVar[str] = "matryoshka"
    ROOM: ClassVar[int] = 4  # early latents are active more often, and lie on one device

    def __post_init__(self):
        super().__post_init__()
        nested = self.nested
        if any(b <= a for a, b in zip((0, *nested), nested, strict=False)) or nested[-1] != self.width:
            raise UserError(f"Matryoshka: prefixes {list(self.prefixes)} must ascend to the width {self.width}")

    @property
    def nested(self) -> tuple[int, ...]:
        """The prefixes as they apply."""
        if self.prefixes:
            return tuple(self.prefixes)
        return tuple(sorted({max(1, self.width * part // 32) for part in (1, 3, 7, 15, 32)}))

    def _reconstruction(
        self, decoded: Float[Array, "G B D_out"], rest: Float[Array, "*B D_out"], target: Float[Array, "B D_out"], axes: Axes
    ) -> tuple[Float[Array, ""], Float[Array, "B D_out"], dict[str, Array]]:
        """The mean of the prefixes' squared errors; AuxK sees the residual of the last prefix, the whole dictionary.

        Measured beside it: ``prefix_<n>``, the squared error of each.
        """
        residuals = target - rest - decoded
        errors = axes.mean_rows(jnp.square(residuals).sum(axis=(1, 2)) / residuals.shape[1])
        return errors.mean(), residuals[-1], {f"prefix_{n}": error for n, error in zip(self.nested, errors, strict=True)}
