"""How a dictionary is trained: every hyper-parameter, with the default that an expert would start from."""

import dataclasses
import math
from typing import Literal

from dlmscope_jax.dictionaries import TopK
from dlmscope_jax.errors import UserError

Select = Literal["all", "masked", "visible", "predicting"]
_MOST_WARMUP_STEPS = 1_000
_MOST_DEAD_ROWS = 10_000_000
_SHARE = 0.05  # of the run, for warm-up and for calling a latent dead


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """The training of one dictionary.

    The recipe is Gao et al. 2024 as dictionary_learning and DLM-Scope run it: rows are divided by one scale so that their
    mean squared norm is 1; Adam on squared error plus AuxK, with unit decoder rows. None stands for a default that depends
    on the rest; the ``..._used`` properties say what it comes to.

    Attributes:
      dictionary: what is trained.
      steps: optimiser steps.
      site: which site of the source it reads, ``"resid_post@5"``; None: the only one there is.
      select: which rows of an ``ActivationStore`` it learns from.
      batch_size: rows a step.
      lr: learning rate at its highest; None: 2e-4 / sqrt(N / 2^14) (dictionary_learning's rule), meant for tens of thousands
        of steps; runs of a few hundred want about 1e-3.
      warmup_steps: linear warm-up; None: min(1,000, 5 % of the steps).
      decay_start: share of the steps after which the rate falls linearly to 0.
      betas, eps: of Adam; the small eps is Gao et al.'s and lets rare latents, whose gradients are tiny, move at full speed.
      clip: largest global norm of the gradient, taken after its part along the decoder rows is removed.
      aux_alpha: weight of AuxK; 0 leaves it out.
      dead_rows: rows without firing after which a latent counts as dead; None: min(10 M, 5 % of the run's rows).
      sample_rows: rows at the start of the training order from which input scale and b_dec are estimated.
      seed: of the first weights and of the order of the rows.

    Raises:
      UserError: a number outside of its range, a transcoder.
    """

    dictionary: TopK
    steps: int
    site: str | None = None
    select: Select = "all"
    batch_size: int = 2048
    lr: float | None = None
    warmup_steps: int | None = None
    decay_start: float = 0.8
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 6.25e-10
    clip: float = 1.0
    aux_alpha: float = 1 / 32
    dead_rows: int | None = None
    sample_rows: int = 8192
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dictionary.d_out is not None:
            raise UserError("TrainSpec: training reads one site for input and target; a transcoder (d_out) cannot be trained yet")
        for name in ("steps", "batch_size", "sample_rows", "warmup_steps", "dead_rows", "seed"):
            value = getattr(self, name)
            if value is None and name in ("warmup_steps", "dead_rows"):
                continue
            least = 0 if name in ("warmup_steps", "seed") else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"TrainSpec: {name} = {value!r} must be an integer of at least {least}")
        for name, positive in (("lr", True), ("eps", True), ("clip", True), ("aux_alpha", False)):
            value = getattr(self, name)
            if value is None and name == "lr":
                continue
            if not math.isfinite(value) or value < 0 or (positive and value == 0):
                raise UserError(f"TrainSpec: {name} = {value!r} must be {'above 0' if positive else '0 or above'}")
        if not 0 < self.decay_start <= 1:
            raise UserError(f"TrainSpec: decay_start = {self.decay_start!r} is a share of the steps, in (0, 1]")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"TrainSpec: betas = {self.betas!r} must be two numbers in [0, 1)")

    @property
    def name(self) -> str:
        """``"resid_post@5_k32"``: the folder of this dictionary in a run."""
        return f"{self.site}_k{self.dictionary.k}" if self.site else f"k{self.dictionary.k}"

    @property
    def lr_used(self) -> float:
        """The learning rate at its highest."""
        return 2e-4 / math.sqrt(self.dictionary.width / 2**14) if self.lr is None else self.lr

    @property
    def warmup_used(self) -> int:
        """Steps of warm-up."""
        return min(_MOST_WARMUP_STEPS, int(_SHARE * self.steps)) if self.warmup_steps is None else self.warmup_steps

    @property
    def dead_rows_used(self) -> int:
        """Rows without firing after which a latent counts as dead, at least one batch."""
        if self.dead_rows is not None:
            return self.dead_rows
        return max(self.batch_size, min(_MOST_DEAD_ROWS, int(_SHARE * self.steps * self.batch_size)))
