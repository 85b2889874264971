"""Measures trained pocket models on the test side and exports them as ordinary folders with a model card.

    python scripts/pocket_card.py --work build/pocket                # all three, into the package
    python scripts/pocket_card.py --work build/pocket --only export  # the folders alone, without measuring
    python scripts/pocket_card.py --seed 1 --out build/pocket-1      # another set, elsewhere

Every number of a card is printed by this script. The corpus hashes go to ``dlmscope_jax/pocket/corpus.json``.
"""

import argparse
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from train_pocket import BATCH, MASK, PEAK, SHAPE, STEPS, load_tree, pocket_model

import dlmscope_jax
from dlmscope_jax.data import Blocks, builtin_blocks, builtin_documents, load_tokenizer, manifest, synthetic_blocks
from dlmscope_jax.diffusion import align_logits, corrupt, elbo, token_loss
from dlmscope_jax.models import init_params, load_model, save_model

PACKAGE = Path(dlmscope_jax.__file__).parent / "pocket"
RATES = [round(0.05 + 0.1 * i, 2) for i in range(10)]
BLOCKS = 96  # test blocks of the loss tables
SYNTHETIC = 48  # synthetic test blocks of the accuracy table
DISTANCES = 4  # farther neighbours than this count as this far
PRIORS = (3.0, 10.0, 30.0, 100.0)  # pseudo-counts of the count models, of which dev chooses


def neighbour_counts(tokens: np.ndarray, keep: np.ndarray) -> list[np.ndarray]:
    """``counts[d - 1][a, b]``: how often b stands d positions after a, both real tokens."""
    counts = [np.zeros((SHAPE.vocab_size,) * 2, np.float32) for _ in range(DISTANCES)]
    for d, table in enumerate(counts, start=1):
        real = keep[:, :-d] & keep[:, d:]
        np.add.at(table, (tokens[:, :-d][real], tokens[:, d:][real]), 1)
    return counts


class Baselines:
    """Count models of the train side; smoothing and weights are chosen on dev."""

    def __init__(self, train: Blocks, dev: Blocks):
        keep = train.documents >= 0
        scored = train.tokens[:, 1:][keep[:, 1:]]  # the first token of a block is never scored
        self.unigram = np.log((np.bincount(scored, minlength=SHAPE.vocab_size) + 1.0) / (scored.size + SHAPE.vocab_size))
        self.counts = neighbour_counts(train.tokens, keep)
        self.prior, self.weight = 30.0, 1.0
        keep = dev.documents >= 0
        rng = np.random.default_rng(0)
        masked = keep & (rng.random(keep.shape) < rng.random((len(keep), 1)))
        masked[:, 0] = False

        def loss(**setting: float) -> float:
            vars(self).update(setting)
            return self.masked(dev.tokens, masked)

        bigram_prior = {prior: self.bigram(dev.tokens, keep, prior) for prior in PRIORS}
        self.bigram_prior = min(bigram_prior, key=bigram_prior.get)
        grid = {(prior, weight): loss(prior=prior, weight=weight) for prior in PRIORS for weight in (0.6, 0.8, 1.0)}
        self.prior, self.weight = min(grid, key=grid.get)

    def given(self, distance: int, neighbour: np.ndarray, left: bool, prior: float) -> np.ndarray:
        """log p(token | neighbour at this distance to the left or right), [n, V]; ``prior`` pseudo-counts are spread as the unigram is."""
        table = self.counts[min(distance, DISTANCES) - 1]
        rows = (table[neighbour] if left else table[:, neighbour].T) + prior * np.exp(self.unigram)
        return np.log(rows / rows.sum(axis=1, keepdims=True))

    def bigram(self, tokens: np.ndarray, keep: np.ndarray, prior: float | None = None) -> float:
        """Nats a token of the next-token bigram."""
        prior = self.bigram_prior if prior is None else prior
        total = 0.0
        for row, real in zip(tokens, keep, strict=True):
            logp = self.given(1, row[:-1], True, prior)[np.arange(len(row) - 1), row[1:]]
            total -= logp[real[1:] & real[:-1]].sum()
        return total / (keep[:, 1:] & keep[:, :-1]).sum()

    def masked(self, tokens: np.ndarray, masked: np.ndarray) -> float:
        """Nats a masked token of the model of the nearest visible token on either side (a weighted product of the two)."""
        total = 0.0
        for row, hidden in zip(tokens, masked, strict=True):
            seen = np.flatnonzero(~hidden)
            at = np.flatnonzero(hidden)
            if not len(at):
                continue
            after = np.searchsorted(seen, at)
            logp = np.tile(self.unigram, (len(at), 1))
            for neighbour, exists, left in ((after - 1, after > 0, True), (after, after < len(seen), False)):
                position = seen[np.clip(neighbour, 0, len(seen) - 1)]
                distance = np.minimum(np.abs(at - position), DISTANCES)
                for d in range(1, DISTANCES + 1):
                    chosen = exists & (distance == d)
                    logp[chosen] += self.weight * (self.given(d, row[position[chosen]], left, self.prior) - self.unigram)
            logp -= np.logaddexp.reduce(logp, axis=1, keepdims=True)
            total -= logp[np.arange(len(at)), row[at]].sum()
        return total / masked.sum()


def masked_table(model, params, tokens: np.ndarray, keep: np.ndarray, baselines: Baselines) -> list[dict]:
    """Cross-entropy of masked tokens at each exact-count rate, with both count models on the same masks."""
    loss = jax.jit(lambda p, t, o, m, k: token_loss(model, p, t, o, m, attention_mask=k).sum())
    rows = []
    for i, rate in enumerate(RATES):
        key = jax.random.fold_in(jax.random.key(0), i)
        noised, masked = corrupt(key, tokens, rate, model.diffusion, protect=~keep, exact=True)
        noised, masked = np.asarray(noised), np.asarray(masked)
        parts = [tuple(a[j : j + 8] for a in (noised, tokens, masked, keep)) for j in range(0, len(tokens), 8)]
        total = sum(float(loss(params, *part)) for part in parts)
        unigram = -baselines.unigram[tokens[masked]].mean()
        row = {"rate": rate, "masked": int(masked.sum()), "model": total / masked.sum(), "unigram": float(unigram)}
        rows.append(row | {"neighbours": float(baselines.masked(tokens, masked))})
    return rows


def synthetic_accuracy(model, params, tokenizer) -> dict[str, dict]:
    """Share of the answers whose every token is the most likely one; a diffusion model has this answer alone masked."""
    made = synthetic_blocks(tokenizer, SHAPE.max_positions, "test", SYNTHETIC)
    keep = made.blocks.documents >= 0
    best = jax.jit(lambda p, t, k: align_logits(model.apply(p, t, attention_mask=k).logits, model)[0].argmax(-1))
    if model.diffusion is None:
        guesses = np.concatenate([np.asarray(best(params, made.blocks.tokens[j : j + 8], keep[j : j + 8])) for j in range(0, SYNTHETIC, 8)])
        predicted = [guesses[a.block, a.start : a.stop] for a in made.answers]
    else:
        predicted = []
        for j in range(0, len(made.answers), 16):
            part = [made.answers[min(i, len(made.answers) - 1)] for i in range(j, j + 16)]
            tokens = np.stack([made.blocks.tokens[a.block] for a in part])
            for row, a in zip(tokens, part, strict=True):
                row[a.start : a.stop] = MASK
            guesses = np.asarray(best(params, tokens, np.stack([keep[a.block] for a in part])))
            predicted += [g[a.start : a.stop] for g, a in zip(guesses, part, strict=True)]
    table: dict[str, dict] = {}
    for a, ids in zip(made.answers, predicted, strict=False):
        truth = made.truths[a.document]
        right = tokenizer.decode(list(map(int, ids))).strip() in truth.answers[a.answer].accepted
        for name in (truth.task, f"{truth.task}, {'training' if truth.template_seen else 'held-out'} template"):
            cell = table.setdefault(name, {"right": 0, "answers": 0})
            cell["right"] += right
            cell["answers"] += 1
    return {name: cell | {"accuracy": cell["right"] / cell["answers"]} for name, cell in sorted(table.items())}


def measure(name: str, out: Path, work: Path, seed: int, baselines: Baselines, test, tokenizer) -> dict:
    """Everything that the card of one model says."""
    model, params = load_model(out / name)
    rows = np.random.default_rng(1).permutation(len(test))[:BLOCKS]
    tokens, keep = test.tokens[rows], test.documents[rows] >= 0
    log = [json.loads(line) for line in (work / f"{name}-{seed}" / "log.jsonl").read_text().splitlines()]
    card = {"model": name, "seed": seed, "steps": STEPS[name], "tokens_per_step": BATCH * SHAPE.max_positions, "checkpoints": log}
    card["parameters"] = sum(leaf.size for leaf in jax.tree.leaves(params))
    if model.diffusion is None:
        loss = jax.jit(lambda p, t, k: token_loss(model, p, t, t, k & jnp.roll(k, 1, axis=1), attention_mask=k).sum())
        scored = (keep[:, 1:] & keep[:, :-1]).sum()
        total = sum(float(loss(params, tokens[j : j + 8], keep[j : j + 8])) for j in range(0, len(tokens), 8))
        unigram = -baselines.unigram[tokens[:, 1:][keep[:, 1:] & keep[:, :-1]]].mean()
        bigram = baselines.bigram(tokens, keep)
        card["next_token"] = {"scored": int(scored), "model": total / scored, "unigram": float(unigram), "bigram": bigram}
    else:
        card["masked"] = masked_table(model, params, tokens, keep, baselines)
        bound = jax.jit(lambda p, t, k, key: elbo(model, p, t, key, attention_mask=k, samples=16))
        parts = [bound(params, tokens[j : j + 8], keep[j : j + 8], jax.random.key(j)) for j in range(0, len(tokens), 8)]
        weights = keep.sum(axis=1) - 1
        card["elbo"] = float((np.concatenate(parts) * weights).sum() / weights.sum())
    card["synthetic"] = synthetic_accuracy(model, params, tokenizer)
    return card


KINDS = {
    "pocket-dlm": "A masked diffusion language model in LLaDA's layout (bidirectional, unshifted).",
    "pocket-ar": "An autoregressive language model in Llama's layout, the twin of pocket-dlm.",
    "pocket-dream": "A masked diffusion language model in Dream's layout (bidirectional, shifted by one): pocket-ar, trained on.",
}
STARTS = {
    "pocket-dlm": "random, but for two heads of every layer that begin at the left and the right neighbour (pocket-ar has none)",
    "pocket-ar": "random",
    "pocket-dream": f"pocket-ar's parameters after its {STEPS['pocket-ar']:,} steps, with zero query, key and value biases",
}


def write_card(card: dict, out: Path) -> None:
    """README.md and card.json of one model."""
    name = card["model"]
    lines = [f"# {name}", "", KINDS[name], ""]
    shape = f"{SHAPE.n_layers} layers of width {SHAPE.d_model}, byte-level BPE of {SHAPE.vocab_size:,}"
    lines += [f"{card['parameters']:,} parameters, {shape}."]
    lines += ["Trained by `scripts/train_pocket.py` on the train side of the built-in corpus (the standard library sources and pydoc"]
    lines += ["topics that `../corpus.json` lists, ten percent seeded synthetic blocks); measured by `scripts/pocket_card.py` on its"]
    length, start = f"{card['steps']:,} steps of {card['tokens_per_step']:,} tokens", STARTS[name]
    lines += [f"test side. Seed {card['seed']}, {length}, in the one order of the seed"]
    lines += [f"that all three models share, peak learning rate {PEAK[name]:g}; the parameters at the best dev loss. Start: {start}.", ""]
    lines += ["## Test", ""]
    if "next_token" in card:
        row = card["next_token"]
        lines += ["| nats a token | model | bigram | unigram |", "|---|---|---|---|"]
        lines += [f"| next token ({row['scored']:,} scored) | {row['model']:.3f} | {row['bigram']:.3f} | {row['unigram']:.3f} |", ""]
    else:
        lines += ["Cross-entropy in nats a masked token, exact-count corruption, the same masks in every column.", ""]
        lines += ["| rate | masked tokens | model | nearest visible neighbours | unigram |", "|---|---|---|---|---|"]
        for r in card["masked"]:
            lines += [f"| {r['rate']} | {r['masked']:,} | {r['model']:.3f} | {r['neighbours']:.3f} | {r['unigram']:.3f} |"]
        lines += ["", f"ELBO, an upper bound on nats a token: {card['elbo']:.3f}.", ""]
    lines += ["## Synthetic episodes (test)", ""]
    lines += [
        "Values, and half of the templates, never occur in training. A diffusion model has one answer masked and sees what follows it;"
    ]
    lines += [
        "an autoregressive model sees what comes before: the two columns of accuracies are not comparable.",
        "",
        "| task | right | answers | accuracy |",
        "|---|---|---|---|",
    ]
    lines += [f"| {k} | {v['right']} | {v['answers']} | {v['accuracy']:.3f} |" for k, v in card["synthetic"].items()]
    lines += ["", "## Training losses (nats a token; for a diffusion model the 1/p-weighted bound)", ""]
    lines += ["| step | train | dev | test |", "|---|---|---|---|"]
    lines += [f"| {c['step']} | {c['train']:.3f} | {c['dev']:.3f} | {c['test']:.3f} |" for c in card["checkpoints"]]
    (out / name / "README.md").write_text("\n".join(lines) + "\n")
    (out / name / "card.json").write_text(json.dumps(card, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/pocket"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=["export"])
    parser.add_argument("--models", nargs="+", default=list(STEPS))
    parser.add_argument("--out", type=Path, help="folder of the models; the package's own for seed 0")
    args = parser.parse_args()
    if args.out is None and args.seed != 0:
        parser.error("the package holds the models of seed 0: give --out FOLDER for another seed")
    args.out = args.out or PACKAGE
    tokenizer = load_tokenizer("pocket-dlm")
    for name in args.models:
        model = pocket_model(name)
        save_model(args.out / name, model, load_tree(args.work / f"{name}-{args.seed}" / "best.npz", init_params(model, jax.random.key(0))))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(PACKAGE / file, args.out / name / file)
    if args.only == "export":
        return
    (args.out / "corpus.json").write_text(json.dumps(manifest(builtin_documents()), indent=0) + "\n")
    sides = {side: builtin_blocks(tokenizer, SHAPE.max_positions, side) for side in ("train", "dev", "test")}
    baselines = Baselines(sides["train"], sides["dev"].take(slice(0, BLOCKS // 2)))
    for name in args.models:
        card = measure(name, args.out, args.work, args.seed, baselines, sides["test"], tokenizer)
        write_card(card, args.out)
        print(f"{name}: " + json.dumps({k: v for k, v in card.items() if k not in ("checkpoints", "masked")}))


if __name__ == "__main__":
    main()
