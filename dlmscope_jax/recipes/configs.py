"""The configuration of a run, as frozen dataclasses of the standard library (so that the command line starts without jax).

One ``Run`` describes the whole way from text to report, and every verb reads the same file: ``harvest`` uses ``data``
and ``harvest``, ``train`` adds ``dictionary`` and ``train``, and so on. The defaults are those of ``configs/quickstart.yaml``.
"""

import dataclasses
from typing import Literal

from dlmscope_jax.errors import UserError

Select = Literal["all", "masked", "visible", "predicting"]


@dataclasses.dataclass(frozen=True)
class Data:
    """Which text is read and how it is cut."""

    # "builtin" (the corpus that every Python installation carries), a folder, or a .jsonl or .parquet file
    path: str = "builtin"
    # tokens a block
    block_length: int = 256


@dataclasses.dataclass(frozen=True)
class Harvest:
    """Which activations are kept."""

    # NAME@LAYER, layers count from 0
    sites: tuple[str, ...] = ("resid_post@2", "resid_post@4")
    # rows (token positions) of the train side at least; blocks are repeated with new masks where the text is short
    train_rows: int = 500_000
    # rows of the test side at least, for L0, explained variance, dead and dense shares (or all that the text has)
    test_rows: int = 100_000
    # corruption of diffusion models; autoregressive ones always read clean text
    policy: Literal["rate", "batch_rate", "clean"] = "rate"
    # the lowest corruption rate; rates are drawn from [low, high]
    low: float = 0.05
    # the highest rate
    high: float = 1.0
    # blocks a forward pass
    batch_size: int = 32


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """The dictionaries' shape: one is trained for every site and every k."""

    # latents
    width: int = 2048
    # active latents a row, one dictionary for each
    k: tuple[int, ...] = (32,)


@dataclasses.dataclass(frozen=True)
class Train:
    """How dictionaries learn."""

    # optimiser steps
    steps: int = 220
    # rows a step
    batch_size: int = 2048
    # learning rate at its highest
    lr: float = 1e-3
    # steps of linear warm-up; empty is the smaller of 1,000 and 5 % of the steps
    warmup_steps: int | None = None
    # share of the steps after which the rate falls linearly to 0
    decay_start: float = 0.8
    # weight of the auxiliary loss that revives dead latents
    aux_alpha: float = 1 / 32
    # rows without firing after which a latent counts as dead; empty is the smaller of 10 million and 5 % of the run's rows
    dead_rows: int | None = None
    # which rows of a diffusion model are learned from
    select: Select = "all"
    # steps between two checkpoints
    checkpoint_every: int = 1000


@dataclasses.dataclass(frozen=True)
class Released:
    """A dictionary that somebody else trained."""

    # a hub id or a folder
    path: str
    # where the model reads it, NAME@LAYER
    site: str
    # folder below path
    subfolder: str = ""
    # the mask state that it was trained on
    select: Select = "all"


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """How dictionaries are examined, on the test side."""

    # blocks of the test side on which the insertion is scored, at every rate
    blocks: int = 32
    # corruption rates for the insertion of diffusion models; METHODS.md asks for .05, .15, ..., .95
    rates: tuple[float, ...] = (0.05, 0.25, 0.45, 0.65, 0.85)
    # blocks a forward pass
    batch_size: int = 16


@dataclasses.dataclass(frozen=True)
class Report:
    """What the HTML file shows."""

    # latents a dictionary, stratified by density
    latents: int = 50
    # the text that is continued with and without a steered latent
    prompt: str = "def "
    # tokens of the continuation, and denoising steps
    new_tokens: int = 32
    # the steered latent's strength, in units of its largest activation in the report's blocks
    strength: float = 2.0


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its folder is root/name."""

    # the run's folder below root
    name: str = "quickstart"
    # the folder of all runs
    root: str = "runs"
    # pocket-dlm, pocket-dream, pocket-ar, folders or hub ids (only a hub id needs the network)
    models: tuple[str, ...] = ("pocket-dlm", "pocket-dream", "pocket-ar")
    # of the language models' computation
    dtype: Literal["float32", "bfloat16"] = "float32"
    # raw, as published, or folded as TransformerLens does it, which released GPT-2 and Pythia dictionaries need
    weight_processing: Literal["raw", "folded"] = "raw"
    # of masks, of the order of rows and of the dictionaries' first weights
    seed: int = 0
    # which text is read and how it is cut
    data: Data = Data()
    # which activations are kept
    harvest: Harvest = Harvest()
    # one dictionary is trained for every model, site and k
    dictionary: Dictionary = Dictionary()
    # how dictionaries learn
    train: Train = Train()
    # dictionaries to examine in place of training ones
    released: tuple[Released, ...] = ()
    # how dictionaries are examined, on the test side
    evaluate: Evaluate = Evaluate()
    # what the HTML file shows
    report: Report = Report()

    def __post_init__(self) -> None:
        _require(bool(self.name) and "/" not in self.name, "name", "should be the name of a folder, without '/'")
        _require(bool(self.models), "models", "name at least one model")
        _require(len(set(self.models)) == len(self.models), "models", "names one model twice")
        _require(self.data.block_length >= 8, "data.block_length", "should be at least 8 tokens")
        _require(bool(self.harvest.sites), "harvest.sites", "name at least one site, such as resid_post@2")
        _require(0 <= self.harvest.low <= self.harvest.high <= 1, "harvest.low", "should be 0 <= low <= high <= 1")
        _require(self.seed >= 0, "seed", "should be 0 or above")
        rates = self.evaluate.rates
        _require(bool(rates) and all(0 < rate < 1 for rate in rates), "evaluate.rates", "name at least one, each between 0 and 1")
        _require(len(set(rates)) == len(rates), "evaluate.rates", "names one rate twice")
        _require(len(set(self.dictionary.k)) == len(self.dictionary.k), "dictionary.k", "names one k twice")
        _require(self.train.dead_rows is None or self.train.dead_rows > 0, "train.dead_rows", "should be above 0")
        _require(0 < self.train.decay_start <= 1, "train.decay_start", "is a share of the steps, in (0, 1]")
        _require(bool(self.dictionary.k), "dictionary.k", "name at least one k")
        for k in self.dictionary.k:
            _require(0 < k <= self.dictionary.width, "dictionary.k", f"{k} is not between 1 and the width {self.dictionary.width}")
        for section, fields in _POSITIVE.items():
            for field in fields:
                _require(getattr(getattr(self, section), field) > 0, f"{section}.{field}", "should be above 0")


_POSITIVE = {
    "harvest": ("train_rows", "test_rows", "batch_size"),
    "dictionary": ("width",),
    "train": ("steps", "batch_size", "lr", "checkpoint_every"),
    "evaluate": ("blocks", "batch_size"),
    "report": ("latents", "new_tokens"),
}


def _require(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise UserError(f"{field}: {message}")
