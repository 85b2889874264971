"""The science: fidelity, insertion with controls, steering, feature records, look-ups, intervals."""

from .collecting import collect_records, stratified
from .controls import CONDITIONS
from .densities import Firing, firing
from .fidelity import evaluate
from .insertion import RATES, delta_loss, delta_losses
from .intervals import Interval, bootstrap
from .lookup import find_latents, latents_for
from .match import check_match
from .records import FeatureRecord, Window, read_records, records_from_result, records_to_result
from .steering import SCALES, ResidualShare, RowMax, steer, steered_generation

__all__ = [
    "CONDITIONS", "RATES", "SCALES", "FeatureRecord", "Firing", "Interval", "ResidualShare", "RowMax", "Window",
    "bootstrap", "check_match", "collect_records", "delta_loss", "delta_losses", "evaluate", "find_latents", "firing",
    "latents_for", "read_records", "records_from_result", "records_to_result", "steer", "steered_generation", "stratified",
]  # fmt: skip
