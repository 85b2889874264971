#!/usr/bin/env python
"""A whole training step of a TopK autoencoder beside sparsify, SAELens and dictionary_learning: one run, one machine, float32.

A step is what each library's own trainer does with a batch: forward, auxiliary loss of dead latents, backward, gradient along the
decoder rows taken off, clipping, Adam, unit decoder rows. Each contestant has a process of its own and they take turns, so that
what else the machine does falls on all. Printed for every shape: median seconds, how many times as long as ours (median of
the rounds' ratios), our step over the encoder's matrix product alone, and the peak of resident memory while stepping. Ours is
measured twice: no latent dead (the auxiliary loss waits behind a branch) and a tenth of them dead.

    .venv/bin/python scripts/bench_step.py [--shapes 2048,768,16384,32 ...] [--rounds 7] [--against sparsify ...] [--json FILE]

A shape is rows, width of a row, latents, k. Makes an environment of its own for the others, .venv-peers (scripts/peers.py).
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import numpy as np

SHAPES = ("2048,768,16384,32", "2048,768,32768,64", "2048,3584,16384,80", "4096,512,8192,50")
AGAINST = ("sparsify", "saelens", "dictionary_learning")
RATE, AUX, DEAD_SHARE = 1e-4, 1 / 32, 0.1
BATCHES = 4  # different batches, taken in turn


def batches(rows: int, width: int) -> list[np.ndarray]:
    """Rows of norm about 1 that lie near a subspace, so that some latents fire much more often than others."""
    rng = np.random.default_rng(0)
    basis = rng.normal(size=(width // 4, width)) * np.arange(1, width // 4 + 1)[:, None] ** -0.5
    made = [rng.normal(size=(rows, width // 4)) @ basis + 0.1 * rng.normal(size=(rows, width)) for _ in range(BATCHES)]
    scale = np.sqrt(np.square(made[0]).sum(axis=1).mean())
    return [(batch / scale).astype(np.float32) for batch in made]


# --- the contestants: each is built once and has run(i), which takes a step and waits for it


class Ours:
    """The trainer's own compiled step."""

    def __init__(self, shape: tuple[int, int, int, int], dead: bool):
        import jax

        from dlmscope_jax.dictionaries import TopK
        from dlmscope_jax.training import TrainSpec, init_state, make_step

        jax.config.update("jax_enable_compilation_cache", False)
        rows, depth, width, k = shape
        spec = TrainSpec(TopK(depth, width, k), steps=10**6, batch_size=rows, lr=RATE, warmup_steps=0, dead_rows=10**7)
        given = batches(rows, depth)
        self.state, self.step = init_state(spec, sample=given[0]), make_step(spec)
        if dead:
            import dataclasses

            import jax.numpy as jnp

            asleep = jnp.arange(width) < int(DEAD_SHARE * width)
            # far below the others, so that they stay dead; the bias moves by RATE a step
            params = {**self.state.params, "b_enc": jnp.where(asleep, -1e3, 0.0)}
            since = jnp.where(asleep, 2 * 10**7, 0).astype(jnp.int32)
            self.state = dataclasses.replace(self.state, params=params, rows_since_fired=since)
        self.batches = [jax.device_put(batch) for batch in given]

    def run(self, i: int) -> dict:
        import jax

        self.state, metrics = self.step(self.state, self.batches[i % BATCHES])
        jax.block_until_ready((self.state, metrics))
        return {"dead": float(metrics["dead"][0])}


class Encoder:
    """The encoder's matrix product alone, by XLA as in our step."""

    def __init__(self, shape: tuple[int, int, int, int]):
        import jax

        rows, depth, width, _ = shape
        self.x = jax.device_put(batches(rows, depth)[0])
        self.weight = jax.random.normal(jax.random.key(0), (width, depth))
        highest = jax.lax.Precision.HIGHEST
        self.product = jax.jit(lambda x, w: jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), precision=highest))

    def run(self, i: int) -> dict:
        self.product(self.x, self.weight).block_until_ready()
        return {}


class Sparsify:
    """``sparsify.Trainer.fit``'s inner loop with torch's Adam (its own default is a sign descent)."""

    def __init__(self, shape: tuple[int, int, int, int]):
        import torch
        from sparsify import SparseCoder, SparseCoderConfig

        rows, depth, width, k = shape
        self.batches = [torch.from_numpy(batch) for batch in batches(rows, depth)]
        self.coder = SparseCoder(depth, SparseCoderConfig(num_latents=width, k=k))
        self.coder.b_dec.data = self.batches[0].mean(dim=0)
        self.adam = torch.optim.Adam(self.coder.parameters(), lr=RATE)
        self.dead = torch.zeros(width, dtype=torch.bool)

    def run(self, i: int) -> dict:
        import torch

        out = self.coder(self.batches[i % BATCHES], dead_mask=self.dead if self.dead.any() else None)
        (out.fvu + AUX * out.auxk_loss).backward()
        self.coder.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(self.coder.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        self.coder.set_decoder_norm_to_unit_norm()
        return {}


class SAELens:
    """``SAETrainer._train_step`` of a TopK training SAE without automatic mixed precision."""

    def __init__(self, shape: tuple[int, int, int, int]):
        import torch
        from sae_lens.registry import get_sae_training_class

        rows, depth, width, k = shape
        self.batches = [torch.from_numpy(batch) for batch in batches(rows, depth)]
        make, configuration = get_sae_training_class("topk")
        self.sae = make(configuration(d_in=depth, d_sae=width, k=k))
        self.adam = torch.optim.Adam(self.sae.parameters(), lr=RATE)
        self.dead = torch.zeros(width, dtype=torch.bool)

    def run(self, i: int) -> dict:
        import torch
        from sae_lens.saes.sae import TrainStepInput

        self.sae.train()
        given = TrainStepInput(
            sae_in=self.batches[i % BATCHES], dead_neuron_mask=self.dead, coefficients={}, n_training_steps=i, is_logging_step=False
        )
        out = self.sae.training_forward_pass(given)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.adam.step()
        self.adam.zero_grad()
        return {}


class DictionaryLearning:
    """``TopKTrainer.update``."""

    def __init__(self, shape: tuple[int, int, int, int]):
        import torch

        # the package's own __init__ wants language models; its trainers do not
        place = importlib.util.find_spec("dictionary_learning").submodule_search_locations
        package = types.ModuleType("dictionary_learning")
        package.__path__ = list(place)
        sys.modules["dictionary_learning"] = package
        from dictionary_learning.trainers.top_k import TopKTrainer

        rows, depth, width, k = shape
        self.batches = [torch.from_numpy(batch) for batch in batches(rows, depth)]
        self.trainer = TopKTrainer(
            steps=10**6, activation_dim=depth, dict_size=width, k=k, layer=0, lm_name="none", lr=RATE, warmup_steps=0, device="cpu"
        )

    def run(self, i: int) -> dict:
        self.trainer.update(i + 1, self.batches[i % BATCHES])  # its step 0 also looks for a geometric median
        return {}


PEERS = {"sparsify": Sparsify, "saelens": SAELens, "dictionary_learning": DictionaryLearning}
OURS = {"ours": partial(Ours, dead=False), "ours, 10 % dead": partial(Ours, dead=True), "encoder product": Encoder}


def contestant(name: str, shape: tuple[int, int, int, int]) -> None:
    """Builds one, then answers each line on standard input with a line of JSON."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what a library prints is no answer
    if name in PEERS:
        import torch

        torch.manual_seed(0)
        torch.set_num_threads(os.cpu_count() or 1)
        release = lambda: None  # noqa: E731
    else:
        from dlmscope_jax.training.heap import keep_freed_memory
        from dlmscope_jax.training.heap import release_freed_memory as release

        keep_freed_memory()  # as dlmscope's own processes begin
    side = (OURS | PEERS)[name](shape)
    side.run(0)
    release()  # as the trainer does after its first step
    side.run(1)
    Path("/proc/self/clear_refs").write_text("5")  # from here on the peak of resident memory is that of steps
    print("ready", file=answers, flush=True)
    for i, _ in enumerate(sys.stdin):
        begun = time.perf_counter()
        told = side.run(i + 2)
        seconds = time.perf_counter() - begun
        status = Path("/proc/self/status").read_text()
        told |= {"seconds": seconds, "peak_bytes": 1024 * int(status.split("VmHWM:")[1].split()[0])}
        print(json.dumps(told), file=answers, flush=True)


# --- the comparison


def compare(shape: tuple[int, int, int, int], rounds: int, against: list[str], peers: Path | None) -> dict:
    """All contestants at one shape, in turn."""
    names = [*OURS, *against]
    running = {}
    try:
        for name in names:
            python = sys.executable if name in OURS else peers
            command = [python, Path(__file__), "--contestant", name, "--shapes", ",".join(map(str, shape))]
            running[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            if running[name].stdout.readline().strip() != "ready":
                raise SystemExit(f"bench_step: {name} did not start at {shape}; its words are above")
        told: dict[str, list[dict]] = {name: [] for name in names}
        for _ in range(rounds):
            for name in names:
                running[name].stdin.write("\n")
                running[name].stdin.flush()
                told[name].append(json.loads(running[name].stdout.readline()))
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    seconds = {name: [one["seconds"] for one in told[name]] for name in names}
    ours = seconds["ours"]
    return {
        "shape": shape, "rounds": rounds,
        "seconds": {name: statistics.median(seconds[name]) for name in names}, "all_seconds": seconds,
        "ratio": {name: statistics.median(other / own for own, other in zip(ours, seconds[name], strict=True)) for name in names},
        "over_encoder": statistics.median(own / product for own, product in zip(ours, seconds["encoder product"], strict=True)),
        "peak_bytes": {name: max(one["peak_bytes"] for one in told[name]) for name in names},
        "dead": {name: told[name][-1]["dead"] for name in names if name.startswith("ours")},
    }  # fmt: skip


def table(result: dict) -> str:
    """One shape's lines."""
    rows, depth, width, k = result["shape"]
    lines = [f"B {rows}, d {depth}, N {width}, k {k}: medians of {result['rounds']} rounds in turn"]
    lines.append(f"  {'':22}{'seconds':>9}{'/ ours':>8}{'peak GB':>9}")
    for name, seconds in result["seconds"].items():
        lines.append(f"  {name:22}{seconds:9.3f}{result['ratio'][name]:8.2f}{result['peak_bytes'][name] / 1e9:9.2f}")
    lines.append(f"  our step over the encoder product: {result['over_encoder']:.2f}")
    if "dictionary_learning" in result["peak_bytes"]:
        share = result["peak_bytes"]["ours"] / result["peak_bytes"]["dictionary_learning"]
        lines.append(f"  peak memory over dictionary_learning's: {share:.2f}")
    return "\n".join(lines)


def parsed(text: str) -> tuple[int, int, int, int]:
    """``"2048,768,16384,32"`` as numbers."""
    parts = text.split(",")
    if len(parts) != 4 or not all(part.isdigit() and int(part) > 0 for part in parts) or int(parts[3]) > int(parts[2]):
        raise argparse.ArgumentTypeError(f"{text!r} should be rows,width,latents,k such as {SHAPES[0]}")
    return (int(parts[0]), int(parts[1]), int(parts[2]), int(parts[3]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,D,N,K")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--against", nargs="*", default=AGAINST, metavar="NAME", help=", ".join(AGAINST))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        shapes = [parsed(text) for text in args.shapes]
    except argparse.ArgumentTypeError as error:
        parser.exit(2, f"bench_step: --shapes: {error}\n")
    if args.contestant:
        contestant(args.contestant, shapes[0])
        return
    for name in args.against:
        if name not in AGAINST:
            parser.exit(2, f"bench_step: --against {name!r} is not known: one of {', '.join(AGAINST)}\n")
    if args.rounds < 1:
        parser.exit(2, "bench_step: --rounds must be at least 1\n")
    peers = None
    if args.against:
        from peers import python_of_peers

        peers = python_of_peers()
    results = []
    for shape in shapes:
        results.append(compare(shape, args.rounds, list(args.against), peers))
        print(table(results[-1]), flush=True)
    if args.json:
        import jax

        record = {"results": results, "jax": jax.__version__, "cores": os.cpu_count(), "machine": platform.machine()}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
