"""What a training loss is given and what it says: shared by all dictionaries, so that one trainer serves them."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from dlmscope_jax.kernels.axes import ALONE, Axes


@struct.dataclass
class LossSettings:
    """The numbers of a loss that may change from step to step, or from run to run, without compiling again.

    A dictionary reads those that its loss has and leaves the others alone. Rows are in training units: the mean squared norm
    of a row is 1.

    Attributes:
      aux: alpha of AuxK (TopK, BatchTopK, Matryoshka), or the weight of ghost gradients (ReLU; 1 is usual), used where ``dead`` is given.
      sparsity: lambda of the sparsity penalty (ReLU, JumpReLU, Gated).
      preactivation: lambda_P of the pre-activation loss (JumpReLU with the tanh penalty).
      target_l0: L0* (JumpReLU with the target penalty).
      entropy: weight of the marginal entropy in bits (Binary).
      covariance: weight of the summed off-diagonal covariance (Binary).
      k: active latents now, at most the dictionary's own k; None: the dictionary's k (TopK, BatchTopK, Matryoshka).
    """

    aux: float | Float[Array, ""] = 1 / 32
    sparsity: float | Float[Array, ""] = 0.0
    preactivation: float | Float[Array, ""] = 0.0
    target_l0: float | Float[Array, ""] = 0.0
    entropy: float | Float[Array, ""] = 0.0
    covariance: float | Float[Array, ""] = 0.0
    k: int | Int[Array, ""] | None = None


@struct.dataclass
class LossParts:
    """What a training loss consists of; ``loss == sum(terms.values())``, all without gradient.

    Attributes:
      terms: each summand as it enters the loss, weight included: ``reconstruction``, and ``aux``, ``sparsity``, ... where there are such.
      measured: the same quantities before their weight where that says more (``aux``: relative error; ``entropy``: bits).
      explained_variance: 1 - squared error / variance of this batch, for progress lines only (no bias correction, no held-out rows).
      l0: mean number of active latents a row.
      fired: [N] int32, in how many rows each latent was active; of divided latents those that are here.
      statistics: what the batch says of the parameters that are measured and not learned (``threshold`` of BatchTopK).
    """

    terms: dict[str, Array]
    measured: dict[str, Array]
    explained_variance: Array
    l0: Array
    fired: Int[Array, " N"]
    statistics: dict[str, Array]


def squared(residual: Float[Array, "B D"], axes: Axes = ALONE) -> Float[Array, ""]:
    """``mean_b sum_d e^2``: the field's usual reconstruction loss."""
    return axes.mean_rows(jnp.square(residual).sum() / residual.shape[0])


def over_norm(residual: Float[Array, "B D"], target: Float[Array, "B D"], axes: Axes = ALONE) -> Float[Array, ""]:
    """``mean_{b,d} e^2 / |y_b|``: the normalised error of the transcoder paper's code (reference/transcoders.md 1.2).

    The row norm is not squared, so the value depends on the units of the rows; a row of norm 0 counts with norm 1e-8.
    """
    norm = jnp.maximum(jnp.linalg.norm(target, axis=1, keepdims=True), 1e-8)
    return axes.mean_rows((jnp.square(residual) / norm).mean())


def variation(rows: Float[Array, "B D"], axes: Axes = ALONE) -> Float[Array, ""]:
    """The summed squared distance of all rows from their mean."""
    return axes.sum_rows(jnp.square(rows - axes.mean_rows(rows.mean(axis=0))).sum())


def explained(residual: Float[Array, "B D"], target: Float[Array, "B D"], axes: Axes = ALONE) -> Float[Array, ""]:
    """Explained variance of one batch."""
    return 1.0 - axes.sum_rows(jnp.square(residual).sum()) / variation(target, axes)


def total(terms: dict[str, Array]) -> Float[Array, ""]:
    """The loss."""
    return jax.tree.reduce(jnp.add, terms)
