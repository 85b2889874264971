"""From the sections ``dictionary`` and ``dictionaries`` of a configuration to the trainings that they stand for."""

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from dlmscope_jax.dictionaries import BatchTopK, Binary, Gated, JumpReLU, Matryoshka, ReLU, TopK
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import canonical_site
from dlmscope_jax.training import TrainSpec
from dlmscope_jax.training.defaults import defaults

from .configs import LEVELS, Dictionary, Run

_KINDS = {kind.KIND: kind for kind in (TopK, BatchTopK, Matryoshka, ReLU, JumpReLU, Gated, Binary)}
_SHORT = {"k": "k", "sparsity": "s", "target_l0": "l", "entropy": "e", "covariance": "c"}
# fields of a dictionary, of its training, and of its loss that a section may set
_OF_DICTIONARY = (
    "skip", "input_bias", "subtract", "row_norm", "rule", "multi_topk", "k_aux", "selection", "prefixes", "norm_weighted", "error", "ghost",
    "penalty", "bandwidth", "estimator", "temperature", "bits", "follows",
)  # fmt: skip
_OF_TRAINING = ("lr", "optimizer", "sparsity_warmup", "entropy_start", "k_start", "k_anneal_steps", "resample_every")
_OF_RECIPE = (
    "steps", "select", "batch_size", "lr", "warmup_steps", "schedule", "decay_start", "optimizer", "betas", "eps", "clip", "dead_rows",
    "ema", "normalize", "micro_batches",
)  # fmt: skip
_OF_LOSS = ("aux", "sparsity", "target_l0", "entropy", "covariance", "preactivation")


@dataclasses.dataclass(frozen=True)
class Planned:
    """One dictionary of a run: how it is trained, and what tells it from its neighbours.

    Attributes:
      spec: its training; ``spec.label`` is its folder.
      variant: what it is called where architectures are compared, ``"skip_topk"``.
      level: how sparse it is made, ``{"k": 32}`` or ``{"sparsity": 0.01}``.
    """

    spec: TrainSpec
    variant: str
    level: dict[str, float]

    @property
    def about(self) -> dict[str, Any]:
        """What a result says of it, for the report."""
        seed = self.spec.seed if self.spec.init_seed is None else self.spec.init_seed
        return {"architecture": self.spec.dictionary.KIND, "variant": self.variant, "level": self.level, "init_seed": seed}


def planned(run: Run, widths: Mapping[str, int]) -> list[Planned]:
    """All dictionaries of a run on one model: sites x levels x seeds of every section, in that order.

    Args:
      run: the configuration.
      widths: the width of every site that is harvested, by its canonical name.

    Raises:
      UserError: a site that is not harvested, or two dictionaries of one name.
    """
    sections = run.dictionaries or (run.dictionary,)
    several_widths = len({section.width for section in sections}) > 1
    found = []
    for i, section in enumerate(sections):
        where = f"dictionaries[{i}]" if run.dictionaries else "dictionary"
        for site in _sites(section, widths, where):
            try:
                found += [
                    _plan(run, section, site, widths, level, seed, several_widths) for level in _levels(section) for seed in _seeds(section)
                ]
            except UserError as error:  # of a dictionary or a training, which do not know the section that they come from
                raise UserError(f"{where}: {error}") from None
    names = [plan.spec.label for plan in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"dictionaries: two of them would be called {name}: give one of the two sections a name, with name=")
    return found


def _plan(
    run: Run, section: Dictionary, site: str, widths: Mapping[str, int], level: dict[str, Any], seed: int | None, several_widths: bool
) -> Planned:
    recipe = run.train
    variant = section.name or ("skip_" if section.skip else "") + section.architecture
    target = f"{section.target}@{site.rpartition('@')[2]}" if section.target else None
    chosen = {name: getattr(section, name) for name in _OF_DICTIONARY if getattr(section, name) is not None}
    shape: dict[str, Any] = {"d_in": widths[site], "width": section.width, "d_out": widths[target] if target else None}
    shape |= {"k": level["k"]} if "k" in level else {}
    dictionary = _KINDS[section.architecture](**shape, **{k: v for k, v in chosen.items() if k != "skip" or v})
    weights = {**level, "preactivation": section.preactivation, "aux": recipe.aux_alpha if "k" in level else None}
    settings = dataclasses.replace(
        defaults(dictionary).settings, **{name: weights[name] for name in _OF_LOSS if weights.get(name) is not None}
    )
    overrides = {name: getattr(section, name) for name in _OF_TRAINING if getattr(section, name) is not None}
    label = [site, *([f"to_{section.target}"] if target else []), *([variant] if target or variant != "topk" else [])]
    label += [f"w{section.width}"] if several_widths else []
    label += [f"{_SHORT[name]}{value:g}" for name, value in level.items()]
    label += [f"seed{seed}"] if seed is not None and len(section.seeds) > 1 else []
    recipes = {name: getattr(recipe, name) for name in _OF_RECIPE}
    more = {"site": site, "target": target, "settings": settings, "seed": run.seed, "init_seed": seed, "label": "_".join(label)}
    spec = TrainSpec(dictionary, **{**recipes, **more, **overrides})
    return Planned(spec, variant, level)


def _sites(section: Dictionary, widths: Mapping[str, int], where: str) -> list[str]:
    """The sites that a section reads, with those checked that it writes."""
    if section.sites:
        wanted = [site if site in widths else canonical_site(site) for site in section.sites]  # a world's site is none of a model's
    else:
        wanted = [site for site in sorted(widths) if not section.target or site.startswith("mlp_in@")]
    if not wanted:
        raise UserError(
            f"{where}.sites: a transcoder to {section.target} reads mlp_in, which harvest.sites does not name: add mlp_in@LAYER"
        )
    for site in wanted:
        written = f"{section.target}@{site.rpartition('@')[2]}" if section.target else site
        for needed in (site, written):
            if needed not in widths:
                raise UserError(f"{where}: {needed} is not harvested; harvest.sites names {', '.join(widths)}")
    return wanted


def _levels(section: Dictionary) -> list[dict[str, Any]]:
    lists = {name: getattr(section, name) for name in LEVELS[section.architecture] if getattr(section, name)}
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _seeds(section: Dictionary) -> tuple[int | None, ...]:
    return section.seeds or (None,)
