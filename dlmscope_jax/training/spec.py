"""How a dictionary is trained: every hyper-parameter, with the default that an expert would start from."""

import dataclasses
import math
from typing import Literal

from dlmscope_jax.dictionaries import CrossLayer, Dictionary, LossSettings
from dlmscope_jax.errors import UserError

from .defaults import OPTIMISERS, defaults

Select = Literal["all", "masked", "visible", "predicting"]
Schedule = Literal["linear", "cosine", "constant"]
Optimizer = Literal["adam", "adam_bf16", "lion", "signum", "muon", "schedule_free"]
Normalize = Literal["rms", "none"]
_MOST_DEAD_ROWS = 10_000_000
_SHARE = 0.05  # of the run's rows, for calling a latent dead


@dataclasses.dataclass(frozen=True)
class TrainSpec:
    """The training of one dictionary.

    None stands for a default that depends on the rest, mostly the architecture's row in ``defaults.py``; the ``..._used``
    properties say what it comes to.

    Attributes:
      dictionary: what is trained.
      steps: optimiser steps.
      site: which site of the source it reads, ``"resid_post@5"``; None: the only one there is.
      target: the site that a transcoder writes, ``"mlp_out@5"``; rows of both sites belong together. A cross-layer transcoder has one
        site and one target for each layer: ``site=("mlp_in@0", "mlp_in@1"), target=("mlp_out@0", "mlp_out@1")``.
      select: which rows of an ``ActivationStore`` it learns from.
      batch_size: rows a step.
      micro_batches: equal parts of a batch that a step takes one after another, in less memory; their gradients are averaged. What is
        relative to a batch is then relative to such a part: AuxK's error, the penalty ``"target"``, the selection and the threshold of
        BatchTopK and Matryoshka, entropy and covariance. Part m has the rows m, m + micro_batches, ..., on any mesh the same.
      lr: learning rate at its highest. Defaults are meant for tens of thousands of steps; runs of a few hundred want about 1e-3.
      warmup_steps: linear warm-up of the rate.
      schedule: what follows: ``"linear"`` (constant, then linearly to 0), ``"cosine"`` (half a wave to 0) or ``"constant"``.
      decay_start: share of the steps after which ``"linear"`` falls.
      optimizer: ``"adam"``; ``"adam_bf16"`` (both moments in bfloat16, rounded so that their mean is right); ``"lion"``;
        ``"signum"`` (the sign of the momentum); ``"muon"`` for the matrices with Adam for the vectors; ``"schedule_free"``
        (Adam without momentum, averaged; use ``schedule="constant"``).
      betas, eps: of the optimiser.
      clip: largest global norm of the gradient, taken after its part along the decoder rows is removed; None: no limit.
      settings: weights of the loss's terms; ``k`` in it must be None.
      sparsity_warmup: steps over which the sparsity penalty rises linearly from 0.
      entropy_start: step from which the entropy term counts (Binary); the covariance counts from the start.
      k_start: active latents at the first step (TopK, BatchTopK, Matryoshka); None: k throughout.
      k_anneal_steps: steps over which they fall linearly to k; None: a tenth of the run.
      dead_rows: rows without firing after which a latent counts as dead; None: min(10 M, 5 % of the run's rows).
      resample_every: steps between two resamplings of dead latents; None: never. Meant for ReLU, JumpReLU and Gated: latents that
        begin again weakly are seldom among the k largest, so those with a k are better served by AuxK.
      ema: decay of the average of the weights, which is what is saved; None: the weights themselves are.
      normalize: ``"rms"``: rows of a site are divided by one number so that their mean squared norm is 1, targets by one of their own;
        ``"none"``: they are not, and penalties and bandwidths are in units of the raw rows. A dictionary that normalises each
        row itself (``row_norm``) is never given another scale.
      sample_rows: rows at the start of the training order from which scales and biases are estimated.
      seed: of the order of the rows, and of resampling.
      init_seed: of the first weights; None: ``seed``.
      label: name of its folder; None: made from site, architecture and sparsity.

    Raises:
      UserError: a number outside of its range; a transcoder without target; options that do not go together.
    """

    dictionary: Dictionary
    steps: int
    site: str | tuple[str, ...] | None = None
    target: str | tuple[str, ...] | None = None
    select: Select = "all"
    batch_size: int = 2048
    micro_batches: int = 1
    lr: float | None = None
    warmup_steps: int | None = None
    schedule: Schedule = "linear"
    decay_start: float = 0.8
    optimizer: Optimizer = "adam"
    betas: tuple[float, float] | None = None
    eps: float | None = None
    clip: float | None = 1.0
    settings: LossSettings | None = None
    sparsity_warmup: int | None = None
    entropy_start: int = 0
    k_start: int | None = None
    k_anneal_steps: int | None = None
    dead_rows: int | None = None
    resample_every: int | None = None
    ema: float | None = None
    normalize: Normalize = "rms"
    sample_rows: int = 8192
    seed: int = 0
    init_seed: int | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"TrainSpec: {name} = {value!r} must be an integer of at least {least}")
        for name in ("lr", "eps", "clip"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UserError(f"TrainSpec: {name} = {value!r} must be above 0")
        for name, known in _NAMES.items():
            if getattr(self, name) not in known:
                raise UserError(f"TrainSpec: {name} {getattr(self, name)!r} is not known: one of {', '.join(known)}")
        if not 0 < self.decay_start <= 1:
            raise UserError(f"TrainSpec: decay_start = {self.decay_start!r} is a share of the steps, in (0, 1]")
        if self.betas is not None and (len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas)):
            raise UserError(f"TrainSpec: betas = {self.betas!r} must be two numbers in [0, 1)")
        if self.ema is not None and not 0 < self.ema < 1:
            raise UserError(f"TrainSpec: ema = {self.ema!r} is the decay of an average, in (0, 1)")
        if self.label is not None and (not self.label or "/" in self.label or self.label.startswith(".")):
            raise UserError(f"TrainSpec: label {self.label!r} should be the name of a folder, without '/'")
        if self.batch_size % self.micro_batches:
            raise UserError(f"TrainSpec: micro_batches = {self.micro_batches} must divide batch_size = {self.batch_size}")
        self._check_dictionary()
        self._check_combinations()

    def _check_dictionary(self) -> None:
        layers = self.dictionary.layers if isinstance(self.dictionary, CrossLayer) else None
        for name in ("site", "target"):
            value = getattr(self, name)
            if layers is None and isinstance(value, tuple):
                raise UserError(
                    f"TrainSpec: {name} = {value!r} belongs to a cross-layer transcoder; a {type(self.dictionary).__name__} has one"
                )
            if layers is not None and not (isinstance(value, tuple) and len(value) == layers):
                raise UserError(f"TrainSpec: {name} = {value!r} must be a tuple of {layers} sites, one for each layer of the CrossLayer")
        if self.dictionary.transcoder and self.target is None:
            raise UserError("TrainSpec: a transcoder (d_out) needs the site that it writes: give target, such as 'mlp_out@5'")
        if not self.dictionary.transcoder and self.target is not None:
            raise UserError(f"TrainSpec: target={self.target!r} belongs to a transcoder: give the dictionary d_out as well")
        for field in dataclasses.fields(LossSettings):
            value = getattr(self.settings_used, field.name)
            if field.name == "k" and value is not None:
                raise UserError("TrainSpec: settings.k is set by the training: give the dictionary k, and k_start where it is to fall")
            if field.name != "k" and not (math.isfinite(value) and value >= 0):
                raise UserError(f"TrainSpec: settings.{field.name} = {value!r} must be 0 or above")
        if getattr(self.dictionary, "penalty", None) == "target" and not self.settings_used.target_l0 > 0:
            raise UserError("TrainSpec: JumpReLU with penalty='target' needs a target: settings=LossSettings(sparsity=1.0, target_l0=...)")

    def _check_combinations(self) -> None:
        k, rule = getattr(self.dictionary, "k", None), getattr(self.dictionary, "rule", None)
        if self.k_anneal_steps is not None and self.k_start is None:
            raise UserError("TrainSpec: k_anneal_steps says how k falls from k_start: give k_start as well")
        if self.k_start is not None:
            if k is None:
                raise UserError(f"TrainSpec: k_start is for dictionaries with a k, not for {type(self.dictionary).__name__}")
            if not k <= self.k_start <= self.dictionary.width:
                raise UserError(f"TrainSpec: k_start = {self.k_start} must lie between k = {k} and width = {self.dictionary.width}")
            if rule == "groups":
                raise UserError("TrainSpec: k_start does not go with the rule 'groups', which keeps one latent of each of k groups")
            if self.k_anneal_used >= self.steps:
                raise UserError(f"TrainSpec: k_anneal_steps = {self.k_anneal_used} must leave steps at the final k: below {self.steps}")
        if isinstance(self.dictionary, CrossLayer) and self.resample_every is not None:
            raise UserError("TrainSpec: resample_every is not for CrossLayer: its settings.preactivation pulls dead latents back")
        windowed = getattr(self.dictionary, "activation", "jumprelu") == "jumprelu" and getattr(self.dictionary, "bandwidth", 0.0) is None
        if self.normalize == "none" and self.dictionary.row_norm == "none" and windowed:
            raise UserError(
                "TrainSpec: normalize='none' leaves JumpReLU's window without a unit: use 'rms', or, where rows have norms of about 1, "
                "give it bandwidth"
            )
        if self.optimizer == "schedule_free":
            for name in ("ema", "resample_every"):
                if getattr(self, name) is not None:
                    raise UserError(f"TrainSpec: {name} does not go with optimizer='schedule_free', whose weights are an average already")
            if self.betas_used[0] == 0:
                raise UserError("TrainSpec: optimizer='schedule_free' needs a first beta above 0, the weight of the average; 0.9 is usual")

    @property
    def name(self) -> str:
        """``"resid_post@5_k32"``: the folder of this dictionary in a run."""
        if self.label is not None:
            return self.label
        kind, s = self.dictionary.KIND, self.settings_used
        if kind == "binary":
            size = f"e{s.entropy:g}_c{s.covariance:g}"
        elif hasattr(self.dictionary, "k"):
            size = f"k{self.dictionary.k}"
        else:
            size = f"l{s.target_l0:g}" if getattr(self.dictionary, "penalty", None) == "target" else f"s{s.sparsity:g}"
        site, target = (f"{place[0]}..{place[-1]}" if isinstance(place, tuple) else place for place in (self.site, self.target))
        parts = [site, target and f"to_{target}", None if kind == "topk" else kind, size]
        return "_".join(part for part in parts if part)

    @property
    def lr_used(self) -> float:
        """The learning rate at its highest."""
        return defaults(self.dictionary).lr * OPTIMISERS[self.optimizer][0] if self.lr is None else self.lr

    @property
    def betas_used(self) -> tuple[float, float]:
        """The optimiser's decay rates."""
        if self.betas is not None:
            return (self.betas[0], self.betas[1])
        return OPTIMISERS[self.optimizer][1] or defaults(self.dictionary).betas

    @property
    def eps_used(self) -> float:
        """Adam's epsilon."""
        return defaults(self.dictionary).eps if self.eps is None else self.eps

    @property
    def settings_used(self) -> LossSettings:
        """Weights of the loss."""
        return defaults(self.dictionary).settings if self.settings is None else self.settings

    @property
    def warmup_used(self) -> int:
        """Steps of warm-up of the rate."""
        return self._share(defaults(self.dictionary).warmup) if self.warmup_steps is None else self.warmup_steps

    @property
    def sparsity_warmup_used(self) -> int:
        """Steps of warm-up of the sparsity penalty."""
        return self._share(defaults(self.dictionary).sparsity_warmup) if self.sparsity_warmup is None else self.sparsity_warmup

    @property
    def k_anneal_used(self) -> int:
        """Steps over which k falls."""
        return max(1, self.steps // 10) if self.k_anneal_steps is None else self.k_anneal_steps

    @property
    def dead_rows_used(self) -> int:
        """Rows without firing after which a latent counts as dead, at least one batch."""
        if self.dead_rows is not None:
            return self.dead_rows
        return max(self.batch_size, min(_MOST_DEAD_ROWS, int(_SHARE * self.steps * self.batch_size)))

    def _share(self, limits: tuple[int, float]) -> int:
        return min(limits[0], int(limits[1] * self.steps))


_INTEGERS = {
    "steps": 1, "batch_size": 1, "micro_batches": 1, "sample_rows": 1, "warmup_steps": 0, "sparsity_warmup": 0, "entropy_start": 0,
    "k_start": 1, "k_anneal_steps": 1, "dead_rows": 1, "resample_every": 1, "seed": 0, "init_seed": 0,
}  # fmt: skip
_OPTIONAL = ("warmup_steps", "sparsity_warmup", "k_start", "k_anneal_steps", "dead_rows", "resample_every", "init_seed")
_NAMES: dict[str, tuple[str, ...]] = {
    "schedule": ("linear", "cosine", "constant"),
    "optimizer": tuple(OPTIMISERS),
    "normalize": ("rms", "none"),
}
