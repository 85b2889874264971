"""How a language model diffuses: corruption, objectives, samplers, generation."""

from .corruption import corrupt, stratified_times, training_rates
from .generate import generate
from .objectives import align_logits, diffusion_loss, elbo, head_loss, next_token_loss, predicts_next, token_loss
from .samplers import ARSampler, DiffuGPTSampler, DreamSampler, LLaDASampler, MDLMSampler, ParallelSampler, Sampler
from .schedule import dream_counts, dream_fractions, dream_timesteps, mdlm_stays, transfer_counts
from .trace import Collect, Trace

__all__ = [
    "ARSampler", "Collect", "DiffuGPTSampler", "DreamSampler", "LLaDASampler", "MDLMSampler", "ParallelSampler", "Sampler", "Trace",
    "align_logits", "corrupt", "diffusion_loss", "dream_counts", "dream_fractions", "dream_timesteps", "elbo", "generate", "head_loss",
    "mdlm_stays", "next_token_loss", "predicts_next", "stratified_times", "token_loss", "training_rates", "transfer_counts",
]  # fmt: skip
