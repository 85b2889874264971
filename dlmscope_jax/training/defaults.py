"""What an expert starts from: one row of hyper-parameters for each architecture, with where they come from.

Numbers are for training units (mean squared row norm 1). A penalty that its source gives for rows of mean norm sqrt(d) is divided by
d or sqrt(d) accordingly: the squared error shrinks by d, an activation by sqrt(d). The normalised error of the transcoder paper
and its penalty shrink alike, so its lambda stays.

sources: [S] reference/sae_libraries.md 3.1-3.5, [B] binary_autoencoder.md 1.4, [T] transcoders.md 1.5 and 1.7, [E] our estimate.
"""

import dataclasses
import math

from dlmscope_jax.dictionaries import BatchTopK, Binary, CrossLayer, Dictionary, Gated, JumpReLU, LossSettings, ReLU, TopK
from dlmscope_jax.errors import UserError

_NO_LIMIT = 2**31 - 1


@dataclasses.dataclass(frozen=True)
class Defaults:
    """Hyper-parameters of one architecture.

    Attributes:
      lr: learning rate of Adam at its highest.
      betas, eps: of Adam.
      warmup: linear warm-up of the rate: (most steps, share of the run), whichever is less.
      sparsity_warmup: the same for the sparsity penalty.
      settings: weights of the loss.
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: tuple[int, float] = (1_000, 0.05)
    sparsity_warmup: tuple[int, float] = (0, 0.0)
    settings: LossSettings = LossSettings(aux=0.0)


def defaults(dictionary: Dictionary) -> Defaults:
    """The row of a dictionary's architecture.

    Raises:
      UserError: a dictionary of none of them.
    """
    d = dictionary.d_in
    match dictionary:
        case TopK() | BatchTopK():
            # [S] 3.1, 3.2: dictionary_learning's and sparsify's rate; Gao et al.'s eps, with which rare latents, whose gradients
            # are tiny, move at full speed; AuxK 1/32
            return Defaults(2e-4 / math.sqrt(dictionary.width / 2**14), eps=6.25e-10, settings=LossSettings(aux=1 / 32))
        case JumpReLU(penalty="tanh"):
            # [S] 3.3, Anthropic, January 2025: lambda_P = 3e-6, a penalty that rises over the whole run; lr and lambda are [E]
            settings = LossSettings(aux=0.0, sparsity=10 / d, preactivation=3e-6 / math.sqrt(d))
            return Defaults(2e-4, sparsity_warmup=(_NO_LIMIT, 1.0), settings=settings)
        case CrossLayer():
            # [T] 1.8 names the loss and no number: those of JumpReLU with the tanh penalty, of one layer's width [E]
            d = d // dictionary.layers
            settings = LossSettings(aux=0.0, sparsity=10 / d, preactivation=3e-6 / math.sqrt(d))
            return Defaults(2e-4, sparsity_warmup=(_NO_LIMIT, 1.0), settings=settings)
        case JumpReLU():
            # [S] 3.3, DeepMind: 7e-5, betas (0, .999), 1,000 and 10,000 steps of warm-up; lambda, and the share of short runs, are [E]
            settings = LossSettings(aux=0.0, sparsity=1.0 if dictionary.penalty == "target" else 1e-3)
            return Defaults(7e-5, (0.0, 0.999), sparsity_warmup=(10_000, 0.1), settings=settings)
        case Gated():
            # [S] 3.4: dictionary_learning's 5e-5 and betas (0, .999); lambda and its warm-up are [E]
            return Defaults(5e-5, (0.0, 0.999), sparsity_warmup=(2_000, 0.1), settings=LossSettings(aux=0.0, sparsity=0.1))
        case Binary():
            # [B] 1.4: the documented run; no warm-up of either kind, covariance on from the start
            return Defaults(5e-4, warmup=(0, 0.0), settings=LossSettings(aux=0.0, entropy=1e-7, covariance=1e-7))
        case ReLU(error="over_norm"):
            # [T] 1.5: the example script for GPT-2 small (the paper says 2e-5, folder names 2e-4), 5,000 of 14,648 steps of warm-up;
            # its error is a mean over the width, so lambda is 1.4e-4 at 768 and falls as the width grows, as the paper's do
            settings = LossSettings(aux=_ghost(dictionary), sparsity=1.4e-4 * 768 / dictionary.out)
            return Defaults(4e-4, warmup=(5_000, 0.34), settings=settings)
        case ReLU():
            # Anthropic, April 2024: 5e-5, lambda = 5 for rows of norm sqrt(d), rising over the first 5 % of the run; from memory, [E]
            settings = LossSettings(aux=_ghost(dictionary), sparsity=5 / math.sqrt(d))
            return Defaults(5e-5, sparsity_warmup=(_NO_LIMIT, 0.05), settings=settings)
    raise UserError(f"TrainSpec: there is no recipe for a {type(dictionary).__name__}")


def _ghost(dictionary: ReLU) -> float:
    """Ghost gradients are scaled to the error already, so their weight is 1."""
    return 1.0 if dictionary.ghost else 0.0


# For each optimiser: its share of Adam's rate, and betas in place of the architecture's. Sign updates have the length that Adam's
# reach at most: Lion's authors advise rates 3 to 10 times smaller. Muon's betas are those of Adam for the vectors.
OPTIMISERS: dict[str, tuple[float, tuple[float, float] | None]] = {
    "adam": (1.0, None),
    "adam_bf16": (1.0, None),
    "lion": (0.3, (0.9, 0.99)),
    "signum": (0.3, (0.95, 0.0)),
    "muon": (1.0, None),
    "schedule_free": (1.0, (0.9, 0.999)),
}
