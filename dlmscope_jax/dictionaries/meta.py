"""The card of a dictionary: what it was trained on, and what a user must match to read it correctly."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from dlmscope_jax.config import from_mapping, to_mapping
from dlmscope_jax.errors import UserError


@dataclass(frozen=True)
class DictionaryMeta:
    """Where a dictionary belongs. None means "not known" (files of other libraries state only some of it).

    Attributes:
      model: name of the language model.
      site: what it reads, ``"resid_post@5"``; of a cross-layer transcoder ``"mlp_in@0+mlp_in@1"``, and its target likewise.
      layer: the 0-based layer of that site; of several, the first one's.
      model_identity: hash of the model's weights.
      weight_processing: ``"raw"``, or ``"folded"`` where the activations are of a model after ``models.process_weights``.
      corruption: the corruption policy of the training rows, in words.
      tokenizer: digest of the tokenizer.
      select: which rows it was trained on.
      input_scale: training divided its rows by this number.
      scale_folded: whether the parameters act on raw rows; False: on rows divided by ``input_scale``.
      seed, steps: of its training.
      extra: anything else, JSON values.

    Raises:
      UserError: ``extra`` holds something that JSON cannot; parameters that are not folded and no scale to fold.
    """

    model: str
    site: str
    layer: int
    model_identity: str | None = None
    weight_processing: str | None = None
    corruption: str | None = None
    tokenizer: str | None = None
    select: Literal["all", "masked", "visible", "predicting"] | None = None
    input_scale: float | None = None
    scale_folded: bool = True
    seed: int | None = None
    steps: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        try:
            json.dumps(self.extra)
        except (TypeError, ValueError) as error:
            raise UserError(f"dictionary meta: extra must hold JSON values: {error}") from None
        if not self.scale_folded and self.input_scale is None:
            raise UserError("dictionary meta: scale_folded is false but input_scale is missing: give the scale that rows were divided by")

    @property
    def target(self) -> str | None:
        """The site that a transcoder writes, ``"mlp_out@5"``, where its card says so."""
        training = self.extra.get("transcoder")  # what this package's own training says of its two sides
        said = self.extra.get("target") or (training.get("target") if isinstance(training, Mapping) else None)
        return said if isinstance(said, str) else None


def meta_from_mapping(mapping: Any) -> DictionaryMeta:
    """A card from plain values, strictly.

    Raises:
      UserError: an unknown or missing key, a value of a wrong type.
    """
    extra = mapping.get("extra", {}) if isinstance(mapping, Mapping) else {}
    if not isinstance(extra, Mapping):
        raise UserError(f"extra: {extra!r} should be a mapping")
    known = from_mapping(DictionaryMeta, {k: v for k, v in mapping.items() if k != "extra"} if isinstance(mapping, Mapping) else mapping)
    return DictionaryMeta(**{**{k: getattr(known, k) for k in known.__dataclass_fields__}, "extra": dict(extra)})


def meta_to_mapping(meta: DictionaryMeta) -> dict[str, Any]:
    """The inverse of ``meta_from_mapping``."""
    return to_mapping(meta)
