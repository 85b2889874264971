"""A run folder as one value: what the report's sections read, and nothing else.

    runs/<name>/
      config.yaml                                       shown as it is
      results/*.json                                    one measured thing each; file names are free, "kind" says what it is
      dictionaries/<model>/<site>_k<k>/metrics.jsonl    training curves, one JSON object a line: step and any numbers

Kinds ("version" is 1 in all; an unknown kind or version is named in the report and left out, unknown keys are ignored):

``run``
    name, seed, command, device, ``models`` [{name, family, objective: "diffusion" | "shifted diffusion" | "autoregressive",
    identity, parameters, n_layers, d_model, vocab_size}] in the order of the report's columns, ``corpus`` {name, tokenizer,
    block_length, sides: {train: {documents, blocks, rows}, ...}}, ``versions`` {package: version},
    ``times`` [{stage, seconds, rows, reused}].
``fidelity``
    dictionary and what ``analysis.evaluate`` gives for it: ``sets`` {"all" | "masked" | "visible" | "predicting": what
    ``StreamingFidelity.finish`` gives, and ``intervals``}, ``own``, ``enough_rows``; the keys of one set may stand at the top instead.
``delta_loss``
    dictionary and what ``analysis.delta_losses`` gives for it.
``features``
    dictionary and what ``analysis.records_to_result`` gives for its ``FeatureRecord``s, with side, dead_share and selection (in words).
``recovery``
    dictionary and what ``analysis.recovery`` gives for it, of a dictionary of a synthetic world (whose name stands for a model's).
``entropy``
    dictionary and what ``analysis.recovery.binary_entropy`` gives for it, with the world's ``truth`` (bits) and ``true_features``, and
    ``untrained``: the same of the dictionary before training.
``steered_generation``
    dictionary, prompt, sampler, scale (in words) and what ``analysis.steered_generation`` gives.

Results of a run with several architectures also state ``architecture``, ``variant`` (what it is called among others), ``level`` ({"k":
32} or {"sparsity": 0.01}), ``target`` (where a transcoder writes) and ``init_seed``.

``dictionary`` is the folder below ``dictionaries/``, for instance ``pocket-dlm/resid_post@2_k32``. A result of a dictionary that
was trained elsewhere may name it as it likes.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dlmscope_jax.errors import UserError

VERSION = 1
_NAMED = re.compile(r"^(?P<model>.+)/(?P<site>[^/@]+@\d+)(?:_k(?P<k>\d+)|_(?P<rest>[^/]+))?$")
_SETS = ("all", "masked", "visible", "predicting")
OBJECTIVES = ("diffusion", "shifted diffusion", "autoregressive", "synthetic")


@dataclass(frozen=True)
class Model:
    """A language model of the run; ``facts`` is its entry in the run's summary, empty where there is none."""

    name: str
    objective: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Dictionary:
    """A dictionary of the run and everything that was measured of it; None or empty is "not measured"."""

    name: str
    model: str
    site: str
    k: int | None
    curve: tuple[dict[str, Any], ...] = ()
    fidelity: dict[str, Any] | None = None
    insertion: dict[str, Any] | None = None
    features: dict[str, Any] | None = None
    recovery: dict[str, Any] | None = None
    entropy: dict[str, Any] | None = None
    rest: str = ""

    @property
    def label(self) -> str:
        """Its place inside its model: site and k, or what else its folder says."""
        if self.rest.startswith("to_"):
            target = (self.fact("target") or self.rest.removeprefix("to_")).partition("@")[0]
            return f"{self.site} → {target}, {self.rest.removeprefix(f'to_{target}_').replace('_', ' ')}"
        if self.rest:
            return f"{self.site}, {self.rest.replace('_', ' ')}"
        return self.site + (f", k {self.k}" if self.k is not None else "")

    def fact(self, name: str) -> Any:
        """What a result of it states under this name; None where none does."""
        found = (part.get(name) for part in (self.fidelity, self.insertion, self.recovery, self.entropy, self.features) if part)
        return next((value for value in found if value is not None), None)

    @property
    def variant(self) -> str:
        """What it is called among other architectures."""
        return str(self.fact("variant") or self.fact("architecture") or "topk")

    @property
    def written(self) -> str:
        """The site that it writes: its own, or a transcoder's target."""
        return str(self.fact("target") or self.site)

    @property
    def sets(self) -> dict[str, dict[str, Any]]:
        """Fidelity by evaluated set of rows."""
        if self.fidelity is None:
            return {}
        sets = self.fidelity.get("sets") or {}
        if sets:
            return {name: sets[name] for name in [*(n for n in _SETS if n in sets), *(n for n in sets if n not in _SETS)]}
        return {"all": self.fidelity} if "explained_variance" in self.fidelity else {}

    @property
    def own(self) -> tuple[str, dict[str, Any]]:
        """The set of rows that it was trained on, which headline numbers are over, and its fidelity there."""
        sets = self.sets
        name = (self.fidelity or {}).get("own", "all")
        return (name, sets[name]) if name in sets else next(iter(sets.items()), ("all", {}))


@dataclass(frozen=True)
class Run:
    """Everything in a run folder that can be shown."""

    path: Path
    name: str
    summary: dict[str, Any]
    config: str | None
    models: tuple[Model, ...]
    dictionaries: tuple[Dictionary, ...]
    generations: tuple[dict[str, Any], ...]
    left_out: tuple[str, ...]

    @property
    def synthetic(self) -> bool:
        """Whether it has only worlds with known features, which no model reads."""
        return bool(self.models) and all(model.objective == "synthetic" for model in self.models)

    def model(self, name: str) -> Model:
        """The model of that name."""
        return next(model for model in self.models if model.name == name)

    def column(self, name: str) -> int:
        """Its place among the models: the same colour and the same column everywhere."""
        return [model.name for model in self.models].index(name)

    def of(self, model: str) -> tuple[Dictionary, ...]:
        """The dictionaries of one model."""
        return tuple(d for d in self.dictionaries if d.model == model)


def read_run(run_dir: str | Path, measured: bool = True) -> Run:
    """Collects a run folder.

    Args:
      run_dir: the folder.
      measured: whether there must be results; training curves alone are enough otherwise.

    Raises:
      UserError: the folder does not exist, holds no results, or a result in it cannot be read.
    """
    path = Path(run_dir)
    if not path.is_dir():
        raise UserError(f"report: there is no run folder {path}: give a folder that `dlmscope quickstart` or `dlmscope evaluate` made")
    files = sorted((path / "results").glob("*.json"))
    if not files and measured:
        raise UserError(f"report: {path} holds no results (results/*.json): run `dlmscope evaluate` on it first")
    summary: dict[str, Any] = {}
    parts: dict[str, dict[str, Any]] = {}
    generations, left_out = [], []
    for file in files:
        result = _read_json(file)
        kind, version = result.get("kind"), result.get("version", VERSION)
        _check(result, file)
        if version != VERSION:
            left_out.append(f"results/{file.name}: written as version {version}, this report reads version {VERSION}")
        elif kind == "run":
            summary = result
        elif kind in _PARTS:
            parts.setdefault(_dictionary_of(result, file), {})[_PARTS[kind]] = result
        elif kind == "steered_generation":
            generations.append({"dictionary": _dictionary_of(result, file), **result})
        else:
            left_out.append(f"results/{file.name}: this report does not show results of kind {kind!r}")
    for metrics in sorted((path / "dictionaries").glob("*/*/metrics.jsonl")):
        parts.setdefault(metrics.parent.relative_to(path / "dictionaries").as_posix(), {})["curve"] = _read_curve(metrics)
    dictionaries = [_dictionary(name, found) for name, found in parts.items()]
    models = _models(summary, dictionaries)
    order = {model.name: i for i, model in enumerate(models)}
    dictionaries.sort(key=lambda d: (order[d.model], _layer(d.site), d.site, d.k or 0, d.name))
    place = {d.name: i for i, d in enumerate(dictionaries)}
    config = path / "config.yaml"
    return Run(
        path=path,
        name=str(summary.get("name") or path.resolve().name),
        summary=summary,
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else None,
        models=models,
        dictionaries=tuple(dictionaries),
        generations=tuple(sorted(generations, key=lambda result: place.get(result["dictionary"], len(place)))),
        left_out=tuple(left_out),
    )


# what a result cannot be shown without
_NEEDED = {
    "delta_loss": ("rates", "rows", "conditions"),
    "features": ("records",),
    "recovery": ("recovered", "mean_cosine"),
    "entropy": ("bits", "truth"),
    "steered_generation": ("prompt_length", "steps", "plain", "steered"),
}
_NEEDED_OF_RECORDS = {"record": ("latent",), "window": ("tokens", "original", "activations")}
_PARTS = {"fidelity": "fidelity", "delta_loss": "insertion", "features": "features", "recovery": "recovery", "entropy": "entropy"}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        result = _parse(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"report: {file} is not readable JSON ({error}): delete it and measure again") from None
    if not isinstance(result, dict):
        raise UserError(f'report: {file} holds a {type(result).__name__}; a result is an object with a "kind"')
    return result


def _check(result: dict[str, Any], file: Path) -> None:
    """Says which key of a result is missing, instead of a traceback from the middle of a page."""
    lacking = [key for key in _NEEDED.get(result.get("kind", ""), ()) if key not in result]
    for record in result.get("records") or () if result.get("kind") == "features" else ():
        lacking += [f"{key} (of a record)" for key in _NEEDED_OF_RECORDS["record"] if key not in record]
        for window in record.get("windows") or ():
            lacking += [f"{key} (of a window)" for key in _NEEDED_OF_RECORDS["window"] if key not in window]
    if lacking:
        raise UserError(f"report: {file} lacks {lacking[0]}: delete it and measure again")


def _parse(plain: str) -> Any:
    """JSON, with the NaN and infinities that Python writes and other readers refuse as None."""
    return json.loads(plain, parse_constant=lambda name: None)


def _read_curve(file: Path) -> tuple[dict[str, Any], ...]:
    """Logged steps in order. A resumed run repeats some, the last one counts; a torn last line is what a kill leaves."""
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    found: dict[int, dict[str, Any]] = {}
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = _parse(line)
            found[int(entry["step"])] = entry
        except (ValueError, KeyError, TypeError):
            if i < len(lines):
                raise UserError(f"report: {file}, line {i}: not a JSON object with a step") from None
    return tuple(found[step] for step in sorted(found))


def _dictionary_of(result: dict[str, Any], file: Path) -> str:
    name = result.get("dictionary")
    if name is None and "model" in result and "site" in result:
        name = f"{result['model']}/{result['site']}" + (f"_k{result['k']}" if result.get("k") is not None else "")
    if not isinstance(name, str):
        raise UserError(f'report: {file} names no "dictionary" that it was measured on')
    return name


def _dictionary(name: str, found: dict[str, Any]) -> Dictionary:
    match = _NAMED.match(name)
    stated = [found[part] for part in ("fidelity", "insertion", "features", "recovery", "entropy") if part in found]

    def state(key: str) -> Any:
        return next((part[key] for part in stated if part.get(key) is not None), None)

    model = match["model"] if match else state("model") or name.rpartition("/")[0] or name
    site = match["site"] if match else state("site") or name.rpartition("/")[2]
    k = int(match["k"]) if match and match["k"] else state("k")
    rest = match["rest"] if match and match["rest"] else ""
    return Dictionary(name, str(model), str(site), k if isinstance(k, int) else None, rest=rest, **found)


def _models(summary: dict[str, Any], dictionaries: list[Dictionary]) -> tuple[Model, ...]:
    """The run's models in the order of its summary; without one, diffusion models first."""
    described = {entry["name"]: entry for entry in summary.get("models") or () if isinstance(entry, dict) and "name" in entry}
    found = {}
    for name in [*described, *sorted({d.model for d in dictionaries} - set(described))]:
        objective = described.get(name, {}).get("objective")
        found[name] = Model(name, objective or _inferred([d for d in dictionaries if d.model == name]), described.get(name, {}))
    if not described:
        return tuple(sorted(found.values(), key=lambda m: OBJECTIVES.index(m.objective) if m.objective in OBJECTIVES else 9))
    return tuple(found.values())


def _inferred(dictionaries: list[Dictionary]) -> str | None:
    for d in dictionaries:
        if d.insertion is not None:
            if d.insertion.get("objective") == "next token":
                return "autoregressive"
            return "shifted diffusion" if d.insertion.get("predicts_next") else "diffusion"
    return None


def _layer(site: str) -> int:
    layer = site.rpartition("@")[2]
    return int(layer) if layer.isdigit() else -1
