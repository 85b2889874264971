"""The configuration of a run, as frozen dataclasses of the standard library (so that the command line starts without jax).

One ``Run`` describes the whole way from text to report, and every verb reads the same file: ``harvest`` uses ``data``
and ``harvest``, ``train`` adds ``dictionary`` and ``train``, and so on. The defaults are those of ``configs/quickstart.yaml``.
"""

import dataclasses
from typing import Literal

from dlmscope_jax.errors import UserError

Select = Literal["all", "masked", "visible", "predicting"]
Architecture = Literal["topk", "batch_topk", "matryoshka", "relu", "jumprelu", "gated", "binary"]
Optimizer = Literal["adam", "adam_bf16", "lion", "signum", "muon", "schedule_free"]


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Over which devices the work is divided; the defaults use all of them, each with rows of its own."""

    # parts of the rows and of the sequences; empty is whatever the devices leave
    data: int | None = None
    # parts of the latents, and of the language model's width
    model: int = 1
    # copies of the whole on slices that only a network joins; 1 is the number of slices that there are
    replica: int = 1
    # how the dictionary step is divided; empty is shard_map, on one device jit
    parallel: Literal["shard_map", "jit", "pmap"] | None = None


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a run on several hosts, one on each; a TPU pod and a SLURM step say it themselves."""

    # host:port of process 0
    coordinator: str | None = None
    # how many there are
    processes: int | None = None
    # which one this is, from 0
    process: int | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """Which text is read and how it is cut."""

    # "builtin" (the corpus that every Python installation carries), a folder, a .jsonl or .parquet file, or hf://datasets/OWNER/NAME
    path: str = "builtin"
    # tokens a block
    block_length: int = 256
    # .parquet and .jsonl are read bit by bit as far as they are needed, from a folder or the hub, and not held as a whole
    stream: bool = False
    # the column of tables that holds the text
    text: str = "text"


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
    # blocks a forward pass, on all devices together
    batch_size: int = 32
    # of the stored rows; int8 has one scale for each row
    dtype: Literal["bfloat16", "float16", "float32", "int8"] = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Dictionary:
    """Dictionaries of one architecture: one is trained for every site, every entry of the lists that it takes, and every seed."""

    # topk, batch_topk and matryoshka take k; relu and gated take sparsity; jumprelu takes sparsity or target_l0; binary entropy, covariance
    architecture: Architecture = "topk"
    # what its folders and the report call it; empty is the architecture's name
    name: str = ""
    # latents
    width: int = 2048
    # active latents a row
    k: tuple[int, ...] = (32,)
    # weight of the sparsity penalty
    sparsity: tuple[float, ...] = ()
    # active latents that jumprelu's penalty "target" aims at
    target_l0: tuple[float, ...] = ()
    # weight of the marginal entropy, in bits
    entropy: tuple[float, ...] = ()
    # weight of the summed covariance of different latents
    covariance: tuple[float, ...] = ()
    # of the first weights; empty is the run's
    seeds: tuple[int, ...] = ()
    # which of harvest.sites it reads; empty is all of them, for a transcoder those of the name mlp_in
    sites: tuple[str, ...] = ()
    # a transcoder writes this site in the layer that it reads, such as mlp_out; empty is an autoencoder
    target: str = ""
    # a linear path beside the latents of a transcoder
    skip: bool = False

    # a bias of its own that a transcoder subtracts before encoding
    input_bias: bool | None = None
    # whether an autoencoder subtracts its decoder bias before encoding
    subtract: bool | None = None
    # what is done to each row before encoding
    row_norm: Literal["none", "layer_norm", "unit_rms"] | None = None
    # topk: which latents are kept
    rule: Literal["positive", "raw", "magnitude", "groups"] | None = None
    # topk: adds the error of 4 k latents
    multi_topk: bool | None = None
    # topk, batch_topk, matryoshka: dead latents that revive together
    k_aux: int | None = None
    # topk, batch_topk, matryoshka: what factors the product has from which latents are chosen; values are float32 either way
    selection: Literal["float32", "bfloat16"] | None = None
    # matryoshka: numbers of latents that must do on their own
    prefixes: tuple[int, ...] | None = None
    # relu: the penalty weighs decoder norms, which are then free
    norm_weighted: bool | None = None
    # relu: the error, summed squares or the transcoder paper's
    error: Literal["squared", "over_norm"] | None = None
    # relu: ghost gradients for dead latents
    ghost: bool | None = None
    # jumprelu: the kind of penalty
    penalty: Literal["step", "target", "tanh"] | None = None
    # jumprelu: width of the kernel of its thresholds' gradient
    bandwidth: float | None = None
    # jumprelu with penalty tanh: weight of the pre-activation loss
    preactivation: float | None = None

    # binary: the gradient of the step
    estimator: Literal["identity", "sigmoid", "rectangle", "g_times_1mg", "x_times_1mx"] | None = None
    # binary: of the estimator, sigmoid or rectangle
    temperature: float | None = None
    # binary: bits of a latent
    bits: int | None = None
    # binary: whose word counts where paper and released code disagree
    follows: Literal["code", "paper"] | None = None

    # in place of those of the section train
    lr: float | None = None
    optimizer: Optimizer | None = None
    # steps over which the sparsity penalty rises
    sparsity_warmup: int | None = None
    # binary: the step from which the entropy counts
    entropy_start: int | None = None
    # k at the first step, and the steps in which it falls to k
    k_start: int | None = None
    k_anneal_steps: int | None = None
    # steps between two resamplings of dead latents
    resample_every: int | None = None


# which lists an architecture takes, and which of its options the others do not have
LEVELS: dict[str, tuple[str, ...]] = {
    "topk": ("k",), "batch_topk": ("k",), "matryoshka": ("k",), "relu": ("sparsity",), "gated": ("sparsity",),
    "jumprelu": ("sparsity", "target_l0"), "binary": ("entropy", "covariance"),
}  # fmt: skip
_LISTS = ("k", "sparsity", "target_l0", "entropy", "covariance", "seeds")
_K = ("topk", "batch_topk", "matryoshka")
_OPTIONS: dict[str, tuple[str, ...]] = {
    "rule": ("topk",), "multi_topk": ("topk",), "k_aux": _K, "selection": _K, "prefixes": ("matryoshka",),
    "k_start": _K, "k_anneal_steps": _K,
    "norm_weighted": ("relu",), "error": ("relu",), "ghost": ("relu",), "sparsity_warmup": ("relu", "gated", "jumprelu"),
    "penalty": ("jumprelu",), "bandwidth": ("jumprelu",), "preactivation": ("jumprelu",), "estimator": ("binary",),
    "temperature": ("binary",), "bits": ("binary",), "follows": ("binary",), "entropy_start": ("binary",),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Synthetic:
    """A world with known features, which takes the place of a model: ``dlmscope_jax.data.World``."""

    # its folder
    name: str
    # which features are on together
    kind: Literal["independent", "correlated", "hierarchical", "directions"] = "independent"
    # width of a row
    dimension: int = 64
    # true features
    features: int = 256
    # mean number of features that are on in a row
    l0: float = 4.0
    # no two directions have a cosine of this size or more
    coherence: float = 0.5
    # standard deviation of noise on each entry
    noise: float = 0.0
    # features that fire together, or a parent with its children
    group: int = 4
    # correlation within a group
    rho: float = 0.8
    # probability of a child where its parent is on
    child: float = 0.3
    # directions: probability of a 1
    q: float = 0.5
    # directions: the other value is -1
    signed: bool = False


@dataclasses.dataclass(frozen=True)
class Train:
    """How dictionaries learn."""

    # optimiser steps
    steps: int = 220
    # rows a step
    batch_size: int = 2048
    # learning rate at its highest; empty is the architecture's own
    lr: float | None = 1e-3
    # steps of linear warm-up; empty is the smaller of 1,000 and 5 % of the steps
    warmup_steps: int | None = None
    # how the rate falls
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    # share of the steps after which the rate falls to 0
    decay_start: float = 0.8
    # adam with float32 or bfloat16 moments, sign methods, Muon for the matrices, schedule-free
    optimizer: Optimizer = "adam"
    # of Adam; empty is the architecture's own
    betas: tuple[float, float] | None = None
    # of Adam; empty is the architecture's own
    eps: float | None = None
    # largest norm of a gradient
    clip: float | None = 1.0
    # weight of the auxiliary loss that revives dead latents
    aux_alpha: float = 1 / 32
    # rows without firing after which a latent counts as dead; empty is the smaller of 10 million and 5 % of the run's rows
    dead_rows: int | None = None
    # decay of the running mean of the weights, which is then what is saved
    ema: float | None = None
    # rms: rows are divided by one scale so that their mean squared norm is 1, and weights of losses are in these units
    normalize: Literal["rms", "none"] = "rms"
    # which rows of a diffusion model are learned from
    select: Select = "all"
    # store: rows that were harvested; growing: the same while another process harvests; model: straight from the model, none are kept
    source: Literal["store", "growing", "model"] = "store"
    # parts of a batch whose gradients are added up one after the other, where the whole batch does not fit
    micro_batches: int = 1
    # source model: rows that are shuffled together
    buffer_rows: int = 1 << 18
    # steps between two checkpoints
    checkpoint_every: int = 1000
    # how many of the newest checkpoints stay
    keep: int = 2
    # a metric whose best checkpoint stays as well
    best: Literal["explained_variance", "loss"] | None = None


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

    # latents a dictionary, stratified by density; 0 leaves out latents and the steered text
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
    # devices that are not here, for dlmscope plan: v5e:16x16, v5p:4x4x4, v6e:8x8; empty is this machine's
    topology: str = ""
    # over which devices the work is divided
    mesh: Mesh = Mesh()
    # the processes of a run on several hosts
    cluster: Cluster = Cluster()
    # raw, as published, or folded as TransformerLens does it, which released GPT-2 and Pythia dictionaries need
    weight_processing: Literal["raw", "folded"] = "raw"
    # of masks, of the order of rows and of the dictionaries' first weights
    seed: int = 0
    # which text is read and how it is cut
    data: Data = Data()
    # which activations are kept
    harvest: Harvest = Harvest()
    # worlds with known features, in place of models
    synthetic: tuple[Synthetic, ...] = ()
    # one dictionary is trained for every model, site and k
    dictionary: Dictionary = Dictionary()
    # dictionaries of several kinds, in place of that one; all learn from one pass over the rows
    dictionaries: tuple[Dictionary, ...] = ()
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
        _require(not self.dictionaries or self.dictionary == Dictionary(), "dictionary", "give it or dictionaries, not both")
        _check_dictionary(self.dictionary, "dictionary.")
        for i, one in enumerate(self.dictionaries):
            _check_dictionary(one, f"dictionaries[{i}].")
        worlds = [world.name for world in self.synthetic]
        _require(len(set(worlds)) == len(worlds) and all(worlds) and not any("/" in w for w in worlds), "synthetic",
                 "give each world a name of its own, without '/'")  # fmt: skip
        _require(not (self.synthetic and self.released), "released", "examines dictionaries of models; there are none with synthetic")
        _require(self.train.dead_rows is None or self.train.dead_rows > 0, "train.dead_rows", "should be above 0")
        _require(0 < self.train.decay_start <= 1, "train.decay_start", "is a share of the steps, in (0, 1]")
        for section, fields in _POSITIVE.items():
            for field in fields:
                value = getattr(getattr(self, section), field)
                _require(value is None or value > 0, f"{section}.{field}", "should be above 0")
        _require(self.report.latents >= 0, "report.latents", "should be 0 or above")
        self._check_places()

    def _check_places(self) -> None:
        """Where rows come from and on what devices they are used."""
        mesh, cluster, recipe = self.mesh, self.cluster, self.train
        _require(recipe.batch_size % recipe.micro_batches == 0, "train.micro_batches",
                 f"should divide train.batch_size, {recipe.batch_size} rows")  # fmt: skip
        _require(recipe.source == "store" or not self.synthetic, "train.source", "a synthetic world's rows come from its store")
        wrapping = mesh.parallel or "shard_map"
        _require(wrapping == "shard_map" or mesh.model == mesh.replica == 1, "mesh.parallel",
                 f"{wrapping} divides neither latents nor replicas: use shard_map, or model: 1 and replica: 1")  # fmt: skip
        if cluster.process is not None:
            _require(cluster.processes is not None and 0 <= cluster.process < cluster.processes, "cluster.process",
                     "should be 0 or above and below cluster.processes")  # fmt: skip
        explicit = cluster.coordinator is not None
        _require(explicit == (cluster.processes is not None), "cluster.processes",
                 "goes with cluster.coordinator: HOST:PORT, and with cluster.process")  # fmt: skip
        _require(not explicit or cluster.process is not None, "cluster.process", "say which one of the processes this is, from 0")
        hub = self.data.path.startswith("hf://")
        _require(not hub or self.data.stream, "data.stream", f"{self.data.path} is on the hub, which is read as a stream: set it to true")
        _require(self.data.path != "builtin" or not self.data.stream, "data.stream", "the builtin corpus is no stream: name data.path")


_POSITIVE = {
    "mesh": ("data", "model", "replica"),
    "cluster": ("processes",),
    "harvest": ("train_rows", "test_rows", "batch_size"),
    "train": ("steps", "batch_size", "lr", "checkpoint_every", "micro_batches", "keep", "buffer_rows"),
    "evaluate": ("blocks", "batch_size"),
    "report": ("new_tokens",),
}


def _check_dictionary(section: Dictionary, path: str) -> None:
    """What an architecture needs and what it does not take."""

    def require(holds: bool, field: str, message: str) -> None:
        _require(holds, path + field, message)

    kind, takes = section.architecture, LEVELS[section.architecture]
    require(section.width > 0, "width", "should be above 0")
    require("/" not in section.name and "@" not in section.name, "name", "is part of a folder's name: leave out '/' and '@'")
    for name in _LISTS:
        values = getattr(section, name)
        given = values != Dictionary.__dataclass_fields__[name].default
        require(name == "seeds" or name in takes or not given, name, f"{kind} does not take it; it takes {' and '.join(takes)}")
        require(len(set(values)) == len(values), name, f"names one {name} twice")
    if "k" in takes:
        require(bool(section.k), "k", "name at least one k")
        for k in section.k:
            require(0 < k <= section.width, "k", f"{k} is not between 1 and the width {section.width}")
    elif kind == "jumprelu" and section.penalty == "target":
        require(bool(section.target_l0), "target_l0", "penalty: target needs the L0 that it aims at, such as [32]")
    elif "sparsity" in takes:
        require(bool(section.sparsity), "sparsity", f"name at least one weight for {kind}, such as [0.001]")
        require(not section.target_l0, "target_l0", "belongs to jumprelu with penalty: target")
    else:
        for name in takes:
            require(bool(getattr(section, name)), name, f"name at least one weight for {kind}, such as [1e-7]; [0] leaves the term out")
    for option, kinds in _OPTIONS.items():
        if getattr(section, option) is not None:
            require(kind in kinds, option, f"belongs to {', '.join(kinds)}, not to {kind}")
    for option in ("skip", "input_bias"):
        require(not getattr(section, option) or bool(section.target), option, "belongs to a transcoder: give target too, such as mlp_out")


def _require(holds: bool, field: str, message: str) -> None:
    if not holds:
        raise UserError(f"{field}: {message}")
