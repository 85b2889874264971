"""Dictionaries: static descriptions with pure functions on parameters, their fidelity, their files."""

from .codes import Dense, RowSparse
from .load import load_dictionary, save_dictionary
from .meta import DictionaryMeta
from .metrics import StreamingFidelity
from .rows import geometric_median, project_gradient, renormalise, unit_rows
from .topk import LossParts, TopK

__all__ = [
    "Dense",
    "DictionaryMeta",
    "LossParts",
    "RowSparse",
    "StreamingFidelity",
    "TopK",
    "geometric_median",
    "load_dictionary",
    "project_gradient",
    "renormalise",
    "save_dictionary",
    "unit_rows",
]
