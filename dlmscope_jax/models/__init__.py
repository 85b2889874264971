"""Language models as pure functions: networks, families, taps, edits, loading."""

from .block import Cache
from .config import DiffusionSpec, ModelConfig, RopeScaling
from .edits import Edit, InDictionary
from .folders import resolve_folder
from .head import Head, logit_lens
from .loading import load_model, model_identity, read_model
from .processing import process_weights
from .saving import save_model
from .sharding import partition_specs
from .sites import canonical_site, parse_site, site_rows, site_width, sites_of
from .transformer import ModelOutput, Transformer, init_params

__all__ = [
    "Cache", "DiffusionSpec", "Edit", "Head", "InDictionary", "ModelConfig", "ModelOutput", "RopeScaling", "Transformer",
    "canonical_site", "init_params", "load_model", "logit_lens", "model_identity", "parse_site", "partition_specs",
    "process_weights", "read_model", "resolve_folder", "save_model", "site_rows", "site_width", "sites_of",
]  # fmt: skip
