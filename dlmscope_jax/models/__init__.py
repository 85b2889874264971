"""Language models as pure functions: networks, families, taps, edits, loading."""

from .config import DiffusionSpec, ModelConfig, RopeScaling
from .edits import Edit, InDictionary
from .loading import load_model, model_identity, read_model, resolve_folder, save_model
from .sharding import partition_specs
from .sites import canonical_site, parse_site, site_width
from .transformer import ModelOutput, Transformer, init_params, logit_lens

__all__ = [
    "DiffusionSpec", "Edit", "InDictionary", "ModelConfig", "ModelOutput", "RopeScaling", "Transformer",
    "canonical_site", "init_params", "load_model", "logit_lens", "model_identity", "parse_site", "partition_specs", "read_model",
    "resolve_folder", "save_model", "site_width",
]  # fmt: skip
