"""AuxK: dead latents learn to reconstruct what the live ones leave over (Gao et al. 2024, appendix A.2, corrected).

Published implementations rank activations after ReLU. A dead latent is usually negative on the whole batch, so it is
then given 0, contributes 0 and receives no gradient (reference/sae_libraries.md 1, defect 3). Here raw pre-activations
are ranked and used.

Four cases are compiled and one runs. No dead latent: nothing. At most k_aux: all of them are used by every row, so
they are gathered into a small dense problem and no selection is needed. At most an eighth of a wide dictionary: they are gathered
and selected from. More: the selection over all N, from pre-activations computed once more, because handing a [B, N] array
to a branch costs a copy of it in every step.

Where latents are divided, each device gathers, or selects from, the dead ones that it holds, and the selection goes on among the
devices. All of them take the same case: it is chosen by counts over all latents.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dlmscope_jax import kernels
from dlmscope_jax.errors import UserError
from dlmscope_jax.kernels.axes import ALONE, Axes
from dlmscope_jax.kernels.topk.sharded import among_shards

from .base import Dictionary
from .losses import LossSettings, variation

_HIGHEST = jax.lax.Precision.HIGHEST
_ROOM_SHARE, _LEAST_ROOM = 8, 512  # dead latents that are gathered: an eighth of the width, where that is this much


def auxiliary_error(
    params: dict,
    x: Float[Array, "B D"],
    residual: Float[Array, "B D_out"],
    dead: Bool[Array, " N"],
    k_aux: int,
    shift_name: str | None,
    axes: Axes = ALONE,
) -> Float[Array, ""]:
    """``sum |e - e_hat|^2 / sum |e - mean(e)|^2`` for the dead latents' reconstruction e_hat of the residual e.

    Args:
      params: the dictionary's parameters; gradients reach ``W_enc``, ``b_enc``, ``W_dec`` and the bias that is subtracted.
      residual: what is left over, without gradient.
      k_aux: how many dead latents a row uses.
      shift_name: the parameter that the encoder subtracts, ``"b_dec"`` in an autoencoder; None: nothing.
      axes: what divides rows and latents.

    Returns:
      0 when no latent is dead or the residual does not vary.
    """
    shift = None if shift_name is None else axes.shared(params[shift_name])
    x, varies = axes.shared(x), variation(residual, axes)

    def relative(estimate):
        error = axes.sum_rows(jnp.square(residual - axes.sum_latents(estimate)).sum())
        return jnp.where(varies > 0, error / jnp.where(varies > 0, varies, 1.0), 0.0)

    def few():
        size = min(k_aux, dead.shape[0])
        ids = jnp.nonzero(dead, size=size, fill_value=0)[0]
        used = jnp.arange(size) < n_here
        values = kernels.preactivations(x, params["W_enc"][ids], params["b_enc"][ids], shift)
        return relative(jnp.matmul(jnp.where(used, values, 0.0), params["W_dec"][ids], precision=_HIGHEST))

    def selected(weights: dict, these: Array):
        pre = jax.lax.stop_gradient(kernels.preactivations(x, weights["W_enc"], weights["b_enc"], shift))
        values, indices = kernels.topk(jnp.where(these, pre, -jnp.inf), min(k_aux, these.shape[0]))
        won = None if axes.latents is None else among_shards(values, k_aux, axes.latents)
        values = kernels.with_encoder_gradient(values, indices, x, weights["W_enc"], weights["b_enc"], shift)
        values = values if won is None else jnp.where(won, values, 0.0)
        return relative(kernels.decode(values, indices, weights["W_dec"]))

    def some():
        ids = jnp.nonzero(dead, size=room, fill_value=0)[0]
        return selected({name: params[name][ids] for name in ("W_enc", "b_enc", "W_dec")}, jnp.arange(room) < n_here)

    n_here, room = dead.sum(dtype=jnp.int32), dead.shape[0] // _ROOM_SHARE
    n_dead = axes.sum_latents(n_here)
    cases, passed = [lambda: jnp.float32(0), few], [n_dead > 0, n_dead > k_aux]
    if room * axes.latent_parts > max(k_aux, _LEAST_ROOM - 1):
        # where one device has no room for all that it holds, none takes this case
        cases, passed = [*cases, some], [*passed, passed[-1] & (axes.max_latents(n_here) > room)]
    case = sum(further.astype(jnp.int32) for further in passed)
    return jax.lax.switch(case, [*cases, lambda: selected(params, dead)])


def share(dead: Bool[Array, " N"], k_aux: int, axes: Axes = ALONE) -> Float[Array, ""]:
    """``min(1, n_dead / k_aux)``: with few dead latents the auxiliary loss counts less."""
    return jnp.minimum(1.0, axes.sum_latents(dead.sum(dtype=jnp.int32)).astype(jnp.float32) / k_aux)


class WithAuxK(Dictionary):
    """A dictionary that keeps k latents and has AuxK for its dead ones; fields ``k``, ``k_aux`` (None: d_in / 2) and ``selection``."""

    k: int
    k_aux: int | None
    selection: kernels.Selection

    def _check_k(self) -> None:
        """As ``_check``, k and k_aux at most the width, and the selection one that there is."""
        self._check(("k",), ("k_aux",))
        if self.selection not in kernels.SELECTIONS:
            raise UserError(f"{type(self).__name__}: selection {self.selection!r} is not known: one of {', '.join(kernels.SELECTIONS)}")
        for field in ("k", "k_aux"):
            value = getattr(self, field)
            if value is not None and value > self.width:
                raise UserError(
                    f"{type(self).__name__}: {field} = {value} is more than the {self.width} latents: {field} must be at most width"
                )

    @property
    def aux_count(self) -> int:
        """k_aux as it applies."""
        return min(self.width, max(1, self.d_in // 2)) if self.k_aux is None else self.k_aux

    def _aux(
        self,
        params: dict,
        x: Float[Array, "B D"],
        residual: Float[Array, "B D_out"],
        dead: Bool[Array, " N"],
        settings: LossSettings,
        axes: Axes = ALONE,
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """The auxiliary error of the residual, held constant, and the term that it is in the loss."""
        constant = jax.lax.stop_gradient(residual)
        error = auxiliary_error(params, x, constant, dead, self.aux_count, self._shift_name(), axes)
        return error, settings.aux * share(dead, self.aux_count, axes) * error
