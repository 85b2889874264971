"""Array operations with a plain reference, faster implementations and one dispatcher each.

``topk(x, k)`` selects within rows, ``topk_batch(x, count)`` over all of them; ``sparse_matmul`` holds the products of sparse codes with a
dictionary and their gradients; ``encode_topk`` is pre-activations, selection and gradient in one. A named implementation works or
raises, none is silently replaced.
"""

from .binarise import ESTIMATORS, binarise
from .covariance import offdiagonal_covariance
from .encode import SELECTIONS, Selection, encode_topk, encode_topk_batch
from .preactivations import preactivations
from .row_update import row_update, squared_norm, tangential
from .sparse_matmul import decode, decode_flat, decode_prefixes, with_encoder_gradient, with_flat_encoder_gradient
from .topk import topk
from .topk.batch import topk_batch

__all__ = [
    "ESTIMATORS",
    "SELECTIONS",
    "Selection",
    "binarise",
    "decode",
    "decode_flat",
    "decode_prefixes",
    "encode_topk",
    "encode_topk_batch",
    "offdiagonal_covariance",
    "preactivations",
    "row_update",
    "squared_norm",
    "tangential",
    "topk",
    "topk_batch",
    "with_encoder_gradient",
    "with_flat_encoder_gradient",
]
