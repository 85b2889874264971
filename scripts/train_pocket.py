"""Trains the pocket models that ship with the package, on the built-in corpus.

    python scripts/train_pocket.py pocket-dlm --work build/pocket
    python scripts/train_pocket.py pocket-ar --work build/pocket
    python scripts/train_pocket.py pocket-dream --work build/pocket     # needs pocket-ar's best parameters

All share architecture, tokenizer, tokens a step and token order; pocket-dlm and pocket-ar share the number of steps.
``pocket-dlm`` starts with two heads of every layer at the neighbours. ``pocket-dream`` is ``pocket-ar`` with bidirectional
attention, trained on as a masked diffusion model that keeps predicting the next position. A killed run
resumes where it was. The best parameters by dev loss are kept; ``scripts/pocket_card.py`` measures and exports them.
"""

import argparse
import dataclasses
import json
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dlmscope_jax.data import builtin_blocks, load_tokenizer
from dlmscope_jax.models import DiffusionSpec, ModelConfig, Transformer, init_params
from dlmscope_jax.training import language_model as lm

SHAPE = ModelConfig(
    family="llada", vocab_size=2048, d_model=192, n_layers=6, n_heads=3, n_kv_heads=3, head_dim=64, d_mlp=512, norm_eps=1e-5,
    rope_theta=10000.0, max_positions=256, attention="bidirectional", bos_id=0, eos_id=1, pad_id=2,
)  # fmt: skip
MASK = 3
STEPS = {"pocket-dlm": 2400, "pocket-ar": 2400, "pocket-dream": 600}
PEAK = {"pocket-dlm": 2e-3, "pocket-ar": 2e-3, "pocket-dream": 1e-3}
BATCH = 8  # 2,048 tokens a step: a masked model leaves its unigram plateau after a number of steps, not of tokens
EVERY = 200  # steps between evaluations, which are also checkpoints
HELD_OUT = 48  # blocks of dev and of test in those evaluations


def pocket_model(name: str) -> Transformer:
    """The network and the diffusion facts of one pocket model."""
    if name == "pocket-dlm":
        return Transformer(dataclasses.replace(SHAPE, rope_float32=True), DiffusionSpec(MASK, shift=False))
    if name == "pocket-ar":
        return Transformer(dataclasses.replace(SHAPE, family="llama", attention="causal"))
    # Qwen2's layout, which Dream has, carries query, key and value biases
    return Transformer(dataclasses.replace(SHAPE, family="dream", qkv_bias=True), DiffusionSpec(MASK, shift=True))


def initial_parameters(name: str, model: Transformer, work: Path, seed: int) -> dict:
    """Random parameters; for ``pocket-dream`` those of ``pocket-ar`` of the same seed, with zero biases."""
    if name == "pocket-ar":
        return init_params(model, jax.random.key(seed))
    if name == "pocket-dlm":
        return attend_to_neighbours(model, init_params(model, jax.random.key(seed)), jax.random.key(seed + 1))
    log = work / f"pocket-ar-{seed}" / "log.jsonl"
    if not log.exists() or json.loads(log.read_text().splitlines()[-1])["step"] < STEPS["pocket-ar"]:
        raise SystemExit(f"pocket-dream starts from pocket-ar of seed {seed}: train that one to its end first")
    params = load_tree(work / f"pocket-ar-{seed}" / "best.npz", init_params(pocket_model("pocket-ar"), jax.random.key(0)))
    blocks = init_params(model, jax.random.key(seed))["params"]["blocks"]
    biases = {k: v for k, v in blocks.items() if k.endswith("_bias")}
    return {"params": params["params"] | {"blocks": params["params"]["blocks"] | biases}}


def attend_to_neighbours(model: Transformer, params: dict, key: jax.Array) -> dict:
    """Starts head 0 of every layer at the token to the left and head 1 at the token to the right.

    A masked position holds the same vector everywhere, so until attention depends on distance no neighbour can be read,
    and finding that out by gradient takes a masked model longer than this script trains it. Half of the embeddings'
    variance is made common to all tokens, and the queries and keys of the two heads turn that common part into
    ``sum_f cos(f (i + d - j))`` over the ten highest rotary frequencies f, which peaks at the neighbour ``j = i + d``.
    """
    cfg, tree = model.config, params["params"]
    common = jax.random.normal(key, (cfg.d_model,))
    direction, size = common / jnp.linalg.norm(common), jnp.linalg.norm(common) / 2**0.5
    half = cfg.head_dim // 2
    frequency = cfg.rope_theta ** (-jnp.arange(half) / half)
    chosen = (jnp.arange(half) < 10) * ((3.0 * cfg.head_dim**0.5) ** 0.5 / size)  # 3 nats between a neighbour and the next
    blocks = dict(tree["blocks"])
    for head, distance in ((0, -1), (1, 1)):
        columns = slice(head * cfg.head_dim, (head + 1) * cfg.head_dim)
        query = jnp.concatenate([chosen * jnp.cos(frequency * distance), chosen * jnp.sin(frequency * distance)])
        key_ = jnp.concatenate([chosen, 0 * chosen])
        blocks["q"] = blocks["q"].at[:, :, columns].add(direction[:, None] * query)
        blocks["k"] = blocks["k"].at[:, :, columns].add(direction[:, None] * key_)
    return {"params": tree | {"embed": (tree["embed"] + common) / 2**0.5, "blocks": blocks}}


def save_tree(path: Path, tree) -> None:
    """Writes the leaves of a tree; the file appears whole or not at all."""
    part = path.with_suffix(".part.npz")
    with open(part, "wb") as file:
        np.savez(file, *[np.asarray(leaf) for leaf in jax.tree.leaves(tree)])
        file.flush()
        os.fsync(file.fileno())
    part.rename(path)


def load_tree(path: Path, like):
    """Reads what ``save_tree`` wrote, into the shape of ``like``."""
    with np.load(path) as stored:
        return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(stored[f"arr_{i}"]) for i in range(len(stored.files))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=tuple(STEPS))
    parser.add_argument("--work", type=Path, default=Path("build/pocket"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = args.work / f"{args.model}-{args.seed}"
    folder.mkdir(parents=True, exist_ok=True)

    tokenizer = load_tokenizer("pocket-dlm")
    sides = {side: builtin_blocks(tokenizer, SHAPE.max_positions, side) for side in ("train", "dev", "test")}
    train, keep = sides["train"].tokens, sides["train"].documents >= 0
    held_out = {side: np.random.default_rng(0).permutation(len(sides[side].tokens))[:HELD_OUT] for side in ("dev", "test")}

    model = pocket_model(args.model)
    spec = lm.LanguageModelSpec(steps=STEPS[args.model], batch_size=BATCH, learning_rate=PEAK[args.model], seed=args.seed)
    state = lm.init_language_model(spec, initial_parameters(args.model, model, args.work, args.seed))
    step, evaluate = lm.make_language_model_step(model, spec), lm.make_evaluation(model)
    log = folder / "log.jsonl"
    if (folder / "state.npz").exists():
        state = load_tree(folder / "state.npz", state)
        rows = [json.loads(line) for line in log.read_text().splitlines()]
        log.write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= int(state.step)))
    best = min((json.loads(line)["dev"] for line in log.read_text().splitlines()), default=np.inf) if log.exists() else np.inf

    recent, started = [], time.time()
    for i in range(int(state.step), spec.steps):
        rows = lm.batch_rows(spec, i, len(train))
        state, metrics = step(state, train[rows], keep[rows])
        recent.append(float(metrics["loss"]))
        if (i + 1) % 10 == 0:
            rate = len(recent) * train[rows].size / (time.time() - started)
            print(f"{args.model} step {i + 1}/{spec.steps} loss {np.mean(recent[-10:]):.3f} {rate:.0f} tokens/s", flush=True)
        if (i + 1) % EVERY == 0 or i + 1 == spec.steps:
            blocks = {side: sides[side].take(rows) for side, rows in held_out.items()}
            loss = {side: evaluate(state.params, b.tokens, b.documents >= 0) for side, b in blocks.items()}
            if loss["dev"] < best:
                best = loss["dev"]
                save_tree(folder / "best.npz", state.params)
            with open(log, "a") as file:
                file.write(json.dumps({"step": i + 1, "train": float(np.mean(recent[-EVERY:])), **loss}) + "\n")
            save_tree(folder / "state.npz", state)
            print(f"{args.model} step {i + 1} dev {loss['dev']:.4f} test {loss['test']:.4f} best dev {best:.4f}", flush=True)


if __name__ == "__main__":
    main()
