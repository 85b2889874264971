"""Array operations with a plain reference, faster implementations and one dispatcher each.

``topk(x, k)`` selects within rows, ``topk_batch(x, count)`` over all of them; ``sparse_matmul`` holds the products of sparse codes with a
dictionary and their gradients. A named implementation works or raises, none is silently replaced.
"""

from .binarise import ESTIMATORS, binarise
from .covariance import offdiagonal_covariance
from .sparse_matmul import decode, preactivations, with_encoder_gradient
from .sparse_matmul.flat import decode_flat, with_flat_encoder_gradient
from .topk import topk
from .topk.batch import topk_batch

__all__ = [
    "ESTIMATORS",
    "binarise",
    "decode",
    "decode_flat",
    "offdiagonal_covariance",
    "preactivations",
    "topk",
    "topk_batch",
    "with_encoder_gradient",
    "with_flat_encoder_gradient",
]
