#!/usr/bin/env python
"""A forward pass beside the torch class of ``transformers``: the same random weights, the same tokens, one machine, one run.

Two models of published sizes (GPT-2 small, Qwen2.5-0.5B) in float32, batch 4 x 256. The two sides take turns, so that what
else the machine does falls on both; the ratio is torch's median time over ours. Also: how long a 32-layer forward pass
takes to compile. Needs torch (`scripts/test` makes such an environment) and, for the second model, 4 GB of disk.

    .venv/bin/python scripts/bench_forward.py [--models gpt2 qwen2] [--batch 4] [--length 256] [--rounds 7] [--json FILE]
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import dlmscope_jax as ds


def twin(name: str):
    """A random torch model of a published size."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(GPT2Config())
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=151936, hidden_size=896, num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
            intermediate_size=4864, rms_norm_eps=1e-6, tie_word_embeddings=True, max_position_embeddings=32768,
            rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
        )
    )  # fmt: skip


def compare(name: str, batch: int, length: int, rounds: int) -> dict:
    """Median seconds of both sides, logits included, and how far their logits are apart."""
    import torch

    theirs = twin(name).eval()
    tokens = np.random.default_rng(0).integers(0, theirs.config.vocab_size, (batch, length))
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, params = ds.load_model(folder)
    forward = jax.jit(lambda params, tokens: model.apply(params, tokens).logits)
    ours, reference = jnp.asarray(tokens, jnp.int32), torch.tensor(tokens)

    def run_ours() -> np.ndarray:
        return np.asarray(forward(params, ours).block_until_ready())

    def run_theirs() -> np.ndarray:
        with torch.no_grad():
            return theirs(reference, use_cache=False).logits.numpy()

    difference = float(np.abs(run_ours() - run_theirs()).max())
    seconds = {"ours": [], "torch": []}
    for _ in range(rounds):
        for side, run in (("ours", lambda: forward(params, ours).block_until_ready()), ("torch", run_theirs)):
            start = time.perf_counter()
            run()
            seconds[side].append(time.perf_counter() - start)
    median = {side: statistics.median(times) for side, times in seconds.items()}
    ratios = sorted(t / o for o, t in zip(seconds["ours"], seconds["torch"], strict=True))
    return {
        "model": name, "batch": batch, "length": length, "ours_seconds": median["ours"], "torch_seconds": median["torch"],
        "ratio": median["torch"] / median["ours"], "ratio_range": [ratios[0], ratios[-1]], "largest_difference": difference,
    }  # fmt: skip


def compile_seconds(layers: int) -> float:
    """Seconds to compile the forward pass of a model with this many layers, nothing cached."""
    from dlmscope_jax.models import ModelConfig, Transformer, init_params

    config = ModelConfig("llada", 126464, 4096, layers, 32, 32, 128, 12288, 1e-5, 5e5, 4096, "bidirectional", rope_float32=True)
    model = Transformer(config, ds.DiffusionSpec(126336, shift=False), jnp.dtype(jnp.bfloat16))
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    lowered = jax.jit(lambda p, t: model.apply(p, t).logits).lower(params, jax.ShapeDtypeStruct((1, 256), jnp.int32))
    start = time.perf_counter()
    lowered.compile()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("gpt2", "qwen2"), default=["gpt2", "qwen2"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    try:
        import torch
        import transformers
    except ImportError as error:
        parser.exit(2, f"bench_forward: {error.name} is not installed: scripts/test makes an environment that has it\n")
    jax.config.update("jax_enable_compilation_cache", False)
    torch.set_num_threads(os.cpu_count() or 1)
    results = [compare(name, args.batch, args.length, args.rounds) for name in args.models]
    for row in results:
        print(
            f"{row['model']:6} {row['batch']} x {row['length']}: ours {row['ours_seconds']:.3f} s, torch {row['torch_seconds']:.3f} s, "
            f"ratio {row['ratio']:.2f} ({row['ratio_range'][0]:.2f} to {row['ratio_range'][1]:.2f}), "
            f"logits within {row['largest_difference']:.1e}"
        )
    compiled = {str(layers): compile_seconds(layers) for layers in (4, 32)}
    print(f"compiling LLaDA-8B's forward pass: {compiled['32']:.2f} s with 32 layers, {compiled['4']:.2f} s with 4")
    if args.json:
        versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        record = {
            "results": results,
            "compile_seconds": compiled,
            "versions": versions,
            "cores": os.cpu_count(),
            "machine": platform.machine(),
        }
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
