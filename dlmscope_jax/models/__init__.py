"""Language models as pure functions: networks, families, taps, edits, loading."""

from .config import DiffusionSpec, ModelConfig, RopeScaling
from .edits import Edit, InDictionary
from .sites import canonical_site, parse_site, site_width
from .transformer import ModelOutput, Transformer, init_params, logit_lens

__all__ = [
    "DiffusionSpec", "Edit", "InDictionary", "ModelConfig", "ModelOutput", "RopeScaling", "Transformer",
    "canonical_site", "init_params", "logit_lens", "parse_site", "site_width",
]  # fmt: skip
