"""Dictionaries: static descriptions with pure functions on parameters, their fidelity, their files."""

from .base import Dictionary
from .batch_topk import BatchTopK
from .binary import Binary
from .codes import Bits, Codes, Dense, FlatSparse, RowSparse
from .cross_layer import CrossLayer
from .gated import Gated
from .jumprelu import JumpReLU
from .load import load_dictionary, save_dictionary
from .losses import LossParts, LossSettings
from .matryoshka import Matryoshka
from .meta import DictionaryMeta
from .metrics import StreamingFidelity
from .packed import load_bits, save_bits
from .relu import ReLU
from .rows import geometric_median, project_gradient, renormalise, unit_rows
from .topk import TopK

__all__ = [
    "BatchTopK",
    "Binary",
    "Bits",
    "Codes",
    "CrossLayer",
    "Dense",
    "Dictionary",
    "DictionaryMeta",
    "FlatSparse",
    "Gated",
    "JumpReLU",
    "LossParts",
    "LossSettings",
    "Matryoshka",
    "ReLU",
    "RowSparse",
    "StreamingFidelity",
    "TopK",
    "geometric_median",
    "load_bits",
    "load_dictionary",
    "project_gradient",
    "renormalise",
    "save_bits",
    "save_dictionary",
    "unit_rows",
]
