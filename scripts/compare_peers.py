#!/usr/bin/env python
"""Ours against dictionary_learning, the library that DLM-Scope was trained with: the same rows in the same batches, equal k.

Rows of a synthetic world (or any .npy of shape [rows, d]) are written to files that both sides read in the same order. Both
train a TopK and a BatchTopK dictionary at the same three learning rates from three paired seeds (which choose rows and first
weights), with the same warm-up, decay and dead-latent window. Each side's rate is the one with the best mean explained variance
on rows of its own; what is compared is explained variance on further rows, where a BatchTopK has its threshold and the L0 that this
gives. The mean of the paired differences must not lie more than two standard errors below 0.

    .venv/bin/python scripts/compare_peers.py [--steps 2000] [--world independent] [--rows FILE.npy] [--json FILE]

Makes an environment of its own, .venv-peers (scripts/peers.py).
"""

import argparse
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
from peers import LEARNING, python_of_peers

RATES, SEEDS, KINDS = (5e-4, 1e-3, 2e-3), (0, 1, 2), ("topk", "batch_topk")
SIDES = ("ours", "peer")
HELD_OUT = 16384  # rows on which a rate is chosen, and as many on which it is scored


def write_rows(folder: Path, settings: dict) -> None:
    """``train_{seed}.npy``, ``choose_{seed}.npy`` and ``score_{seed}.npy``, divided by one scale each seed so that mean |x|^2 = 1."""
    count = settings["steps"] * settings["batch_size"]
    for seed in settings["seeds"]:
        if settings["rows"]:
            rows = np.load(settings["rows"], mmap_mode="r")
            order = np.random.default_rng(seed).permutation(len(rows))
            held, seen = order[: 2 * HELD_OUT], order[2 * HELD_OUT :]
            parts = np.array(rows[np.resize(seen, count)], np.float32), np.array(rows[held], np.float32)
        else:
            from dlmscope_jax.data.worlds import World

            world = World(settings["world"])
            pieces = [world.rows(seed, start, min(65536, count - start))[0] for start in range(0, count, 65536)]
            parts = np.concatenate(pieces), world.rows(seed, 1 << 30, 2 * HELD_OUT)[0]
        scale = np.sqrt(np.square(parts[0]).sum(axis=1).mean())
        np.save(folder / f"train_{seed}.npy", parts[0] / scale)
        np.save(folder / f"choose_{seed}.npy", parts[1][:HELD_OUT] / scale)
        np.save(folder / f"score_{seed}.npy", parts[1][HELD_OUT:] / scale)


def batches(folder: Path, seed: int, settings: dict):
    """The batches of a seed, in the one order that both sides see."""
    rows = np.load(folder / f"train_{seed}.npy", mmap_mode="r")
    for step in range(settings["steps"]):
        yield np.array(rows[step * settings["batch_size"] : (step + 1) * settings["batch_size"]])


def explained_variance(x: np.ndarray, y: np.ndarray) -> float:
    """1 - summed squared error / summed squared deviation from the mean, in float64."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(1 - np.square(x - y).sum() / np.square(x - x.mean(axis=0)).sum())


def scores(folder: Path, seed: int, run) -> dict:
    """Explained variance and L0 on both held-out sets; ``run`` maps rows to (activations, reconstruction)."""
    result = {}
    for name in ("choose", "score"):
        x = np.load(folder / f"{name}_{seed}.npy")
        activations, y = run(x)
        result |= {name: explained_variance(x, y), f"{name}_l0": float((activations != 0).sum(axis=1).mean())}
    return result


def train_ours(folder: Path, settings: dict) -> list[dict]:
    """All rates and kinds of a seed from one pass."""
    import jax.numpy as jnp

    from dlmscope_jax.dictionaries import BatchTopK, TopK
    from dlmscope_jax.training import Checkpoints, TrainSpec, train

    found = []
    for seed in settings["seeds"]:
        probe = np.load(folder / f"train_{seed}.npy", mmap_mode="r")
        shape = {"d_in": probe.shape[1], "width": settings["width"], "k": settings["k"]}
        specs = {
            (kind, lr): TrainSpec(
                {"topk": TopK, "batch_topk": BatchTopK}[kind](**shape), steps=settings["steps"], batch_size=settings["batch_size"], lr=lr,
                warmup_steps=settings["warmup"], decay_start=settings["decay_start"], dead_rows=settings["dead_rows"], normalize="none",
                init_seed=seed, label=f"{kind}_{lr:g}",
            )
            for kind in settings["kinds"] for lr in settings["rates"]
        }  # fmt: skip
        with tempfile.TemporaryDirectory() as run_dir:
            never = Checkpoints(every=settings["steps"])
            trained = train(list(specs.values()), batches(folder, seed, settings), run_dir, checkpoints=never)
        for (kind, lr), one in zip(specs, trained, strict=True):

            def run(x, one=one):
                codes = one.spec.encode(one.params, jnp.asarray(x))
                return np.asarray(one.spec.dense(codes)), np.asarray(one.spec.decode(one.params, codes))

            found.append({"side": "ours", "kind": kind, "lr": lr, "seed": seed} | scores(folder, seed, run))
    return found


def train_peer(folder: Path, settings: dict) -> list[dict]:
    """The same with dictionary_learning's own trainers, whatever they do."""
    import torch

    # the package's own __init__ wants language models; its trainers do not
    place = importlib.util.find_spec("dictionary_learning").submodule_search_locations
    package = types.ModuleType("dictionary_learning")
    package.__path__ = list(place)
    sys.modules["dictionary_learning"] = package
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    found = []
    for seed in settings["seeds"]:
        width = np.load(folder / f"train_{seed}.npy", mmap_mode="r").shape[1]
        for kind in settings["kinds"]:
            for lr in settings["rates"]:
                trainer = {"topk": TopKTrainer, "batch_topk": BatchTopKTrainer}[kind](
                    steps=settings["steps"], activation_dim=width, dict_size=settings["width"], k=settings["k"], layer=0, lm_name="none",
                    lr=lr, warmup_steps=settings["warmup"], decay_start=int(settings["decay_start"] * settings["steps"]),
                    threshold_start_step=settings["steps"] // 2, seed=seed, device="cpu",
                )  # fmt: skip
                trainer.dead_feature_threshold = settings["dead_rows"]  # its own 10 million would never come in a run this short
                for step, rows in enumerate(batches(folder, seed, settings)):
                    trainer.update(step, torch.from_numpy(rows))

                def run(x, ae=trainer.ae):
                    with torch.no_grad():
                        activations = ae.encode(torch.from_numpy(x))
                        return activations.numpy(), ae.decode(activations).numpy()

                found.append({"side": "peer", "kind": kind, "lr": lr, "seed": seed} | scores(folder, seed, run))
    return found


def compare(found: list[dict], kind: str) -> dict:
    """Each side at its best rate, paired by seed."""
    best: dict[str, dict] = {}
    for side in SIDES:
        rates = sorted({run["lr"] for run in found})
        own = {lr: [run for run in found if (run["side"], run["kind"], run["lr"]) == (side, kind, lr)] for lr in rates}
        lr = max(rates, key=lambda lr: statistics.mean(run["choose"] for run in own[lr]))
        runs = sorted(own[lr], key=lambda run: run["seed"])
        best[side] = {
            "lr": lr,
            "explained_variance": [run["score"] for run in runs],
            "l0": statistics.mean(run["score_l0"] for run in runs),
        }
    ours, peer = (best[side]["explained_variance"] for side in SIDES)
    differences = [a - b for a, b in zip(ours, peer, strict=True)]
    mean, error = statistics.mean(differences), statistics.stdev(differences) / math.sqrt(len(differences))
    return {"kind": kind} | best | {"difference": mean, "standard_error": error, "holds": mean >= -2 * error}


def main() -> None:
    """Both sides one after the other, then the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--world", default="independent")
    parser.add_argument("--rows", help="a .npy file of rows in place of a world")
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peer:
        folder = Path(given.peer)
        settings = json.loads((folder / "settings.json").read_text())
        (folder / "peer.json").write_text(json.dumps(train_peer(folder, settings)))
        return
    if len(given.seeds) < 2:
        parser.error("--seeds: a standard error needs at least two")
    settings = {name: getattr(given, name) for name in ("steps", "batch_size", "width", "k", "world", "rows", "kinds", "rates", "seeds")}
    settings |= {"warmup": given.steps // 20, "decay_start": 0.8, "dead_rows": 40 * given.batch_size}
    python = python_of_peers()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, settings)
        (folder / "settings.json").write_text(json.dumps(settings))
        begun = time.perf_counter()
        subprocess.run([python, Path(__file__), "--peer", folder], check=True)
        middle = time.perf_counter()
        found = train_ours(folder, settings) + json.loads((folder / "peer.json").read_text())
        seconds = {"peer": middle - begun, "ours": time.perf_counter() - middle}
    tables = [compare(found, kind) for kind in given.kinds]
    print(f"{given.steps} steps of {given.batch_size} rows, width {given.width}, k {given.k}; {LEARNING}; rates {given.rates}")
    for table in tables:
        print(f"\n{table['kind']:<12}{'lr':>8}{'L0':>8}  explained variance by seed")
        for side in SIDES:
            values = "  ".join(f"{value:.5f}" for value in table[side]["explained_variance"])
            print(f"  {side:<10}{table[side]['lr']:>8g}{table[side]['l0']:>8.3f}  {values}")
        verdict = "holds" if table["holds"] else "does NOT hold"
        print(f"  ours - peer {table['difference']:+.5f}, standard error {table['standard_error']:.5f}: >= -2 standard errors {verdict}")
    print(f"\nseconds: ours {seconds['ours']:.0f}, peer {seconds['peer']:.0f}")
    if given.json:
        Path(given.json).write_text(json.dumps({"settings": settings, "runs": found, "tables": tables, "seconds": seconds}, indent=1))
    if not all(table["holds"] for table in tables):
        sys.exit(1)


if __name__ == "__main__":
    main()
