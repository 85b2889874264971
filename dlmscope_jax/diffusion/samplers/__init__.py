"""Samplers: at each step, which of the unknown tokens become known, and as what.

Confidences are float32 whatever the model computes in (bfloat16 probabilities tie), and ties resolve to the lowest index.
"""

from .autoregressive import ARSampler
from .base import Proposal, Sampler
from .diffugpt import DiffuGPTSampler
from .dream import DreamSampler
from .filters import keep_top_k, keep_top_p
from .llada import LLaDASampler
from .mdlm import MDLMSampler
from .parallel import ParallelSampler

__all__ = [
    "ARSampler", "DiffuGPTSampler", "DreamSampler", "LLaDASampler", "MDLMSampler", "ParallelSampler", "Proposal", "Sampler",
    "keep_top_k", "keep_top_p",
]  # fmt: skip
