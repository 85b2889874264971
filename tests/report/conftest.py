"""A synthetic run folder: invented numbers in the shapes that the recipes write."""

import json
from pathlib import Path

import numpy as np
import pytest

RATES = [round(0.05 + 0.1 * i, 2) for i in range(10)]
MODELS = (("pocket-dlm", "llada", "diffusion"), ("pocket-dream", "dream", "shifted diffusion"), ("pocket-ar", "llama", "autoregressive"))
CONDITIONS = {"clean": 0.0, "spliced": 0.04, "zero": 4.0, "mean": 2.5, "noise": 0.4, "untrained": 1.2}
WORDS = (
    "<|mask|>;def; return; self;(; x;):;\n   ; import; os;.;path; if; not;None; for; in; range;\n;\t; the; value;"
    ' of;=; +;1;,;class; is; key;  ;é;[;];"; raise'
).split(";")
HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!--",
    "]]>",
    '" onmouseover="alert(1)',
    "'",
    "\u2028",
    "\ud800",
    "\u202e",
    "\0",
    "&lt;",
    "",
)


def interval(value: float, width: float, units: int = 60) -> dict:
    return {"value": value, "low": value - width, "high": value + width, "units": units, "draws": 2000, "note": ""}


def a_window(rng: np.random.Generator, group: str, masked_share: float | None, peak_value: float, length: int, vocabulary: int) -> dict:
    original = rng.integers(1, vocabulary, length)
    is_masked = rng.random(length) < (masked_share or 0)
    activations = np.where(rng.random(length) < 0.08, rng.random(length) * peak_value * 0.8, 0.0)
    peak = length // 2
    activations[peak] = peak_value
    return {
        "group": group,
        "document": rng.choice(["json.decoder", "asyncio.events", "topics/assignment", "synthetic/chain/17"]),
        "position": 100 + peak,
        "rate": masked_share,
        "tokens": np.where(is_masked, 0, original).tolist(),
        "original": original.tolist(),
        "is_masked": is_masked.astype(int).tolist(),
        "activations": activations.round(4).tolist(),
        "peak": peak,
    }


def some_records(rng: np.random.Generator, diffusion: bool, n: int, windows: int, length: int, vocabulary: int) -> list[dict]:
    found = []
    for latent in sorted(rng.choice(2048, n, replace=False).tolist()):
        density, largest = float(10 ** rng.uniform(-4, -0.9)), float(rng.uniform(1, 9))
        shown = [("top", largest * (1 - 0.05 * i)) for i in range(windows)] + [
            ("sampled", largest * rng.uniform(0.1, 0.9)) for _ in range(windows)
        ]
        lens = rng.choice(vocabulary, min(10, vocabulary), replace=False).tolist()
        found.append(
            {
                "latent": latent,
                "density": density,
                "rows": 100000,
                "max_activation": largest,
                "mean_activation": largest / 3,
                "decile": int(rng.integers(10)),
                "density_by_rate": [
                    {"low": i / 10, "high": (i + 1) / 10, "rows": 1000, "density": density * (0.2 + i * 0.2)} for i in range(10)
                ]
                if diffusion
                else [],
                "density_masked": density * 1.6 if diffusion else None,
                "density_visible": density * 0.6 if diffusion else None,
                "logit_lens": {
                    "top": [[t, float(3 - 0.2 * i)] for i, t in enumerate(lens)],
                    "bottom": [[t, float(-2 + 0.1 * i)] for i, t in enumerate(lens)],
                },
                "windows": [a_window(rng, g, float(rng.choice(RATES)) if diffusion else None, v, length, vocabulary) for g, v in shown],
            }
        )
    return found


def write_run(
    folder: Path,
    *,
    latents: int = 4,
    windows: int = 2,
    length: int = 9,
    steps: int = 40,
    layers: tuple[int, ...] = (2, 4),
    words=tuple(WORDS),
    seed: int = 0,
) -> Path:
    """Writes the folder and returns it."""
    rng = np.random.default_rng([seed])
    results = folder / "results"
    results.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: made-up\nmodels: [pocket-dlm, pocket-dream, pocket-ar]\nseed: 0\n")
    pieces = {str(i): w for i, w in enumerate(words)}

    def write(name: str, result: dict) -> None:
        (results / f"{name}.json").write_text(json.dumps(result))

    write(
        "run",
        {
            "kind": "run",
            "version": 1,
            "name": "made-up",
            "seed": 0,
            "command": "dlmscope quickstart configs/quickstart.yaml",
            "device": "cpu, 2 cores",
            "models": [
                {
                    "name": n,
                    "family": f,
                    "objective": o,
                    "identity": "3fa9c1d200",
                    "parameters": 3_412_544,
                    "n_layers": 6,
                    "d_model": 192,
                    "vocab_size": 2048,
                }
                for n, f, o in MODELS
            ],
            "corpus": {
                "name": "built-in corpus",
                "tokenizer": "9f" * 32,
                "block_length": 256,
                "sides": {
                    "train": {"documents": 812, "blocks": 9120, "rows": 512000},
                    "test": {"documents": 104, "blocks": 1170, "rows": 100352},
                },
            },
            "versions": {"dlmscope_jax": "0.1.0", "jax": "0.10.2", "python": "3.11.9"},
            "times": [
                {"stage": "harvest pocket-dlm train", "seconds": 48.2, "rows": 512000, "reused": False},
                {"stage": "train pocket-dlm", "seconds": 61.0, "rows": 512000, "reused": False},
                {"stage": "harvest pocket-ar train", "seconds": 0.2, "rows": 512000, "reused": True},
            ],
        },
    )
    for m, (model, _, objective) in enumerate(MODELS):
        diffusion = objective != "autoregressive"
        for layer in layers:
            name, slug = f"{model}/resid_post@{layer}_k32", f"{model}-{layer}"
            metrics = folder / "dictionaries" / name / "metrics.jsonl"
            metrics.parent.mkdir(parents=True)
            metrics.write_text(
                "".join(
                    json.dumps(
                        {
                            "step": s,
                            "rows": 2048 * s,
                            "loss": 0.2 + (1 + m + layer / 4) * 8 / (s + 8),
                            "l0": 32.0 - 20 / (s + 10),
                            "dead": 0.05 * m + 0.3 * np.exp(-s / 60),
                            "explained_variance": 0.9 - 4 / (s + 6),
                            "skipped": 0,
                        }
                    )
                    + "\n"
                    for s in range(1, steps + 1)
                )
            )

            def finished(rows: int, ev: float, diffusion: bool = diffusion, m: int = m) -> dict:
                by_rate = [
                    {
                        "low": i / 10,
                        "high": (i + 1) / 10,
                        "rows": rows // 10,
                        "explained_variance": ev - 0.006 * i * (m + 1),
                        "explained_variance_global_mean": ev - 0.003 * i,
                        "relative_error": {"q25": 0.3, "median": 0.35, "q75": 0.4},
                    }
                    for i in range(10)
                ]
                return {
                    "rows": rows,
                    "l0": 31.7,
                    "explained_variance": ev,
                    "cosine": 0.957,
                    "relative_error": {"q25": 0.211, "median": 0.263, "q75": 0.334},
                    "filtered": {"rows": rows - 400, "explained_variance": ev - 0.03, "norm_median": 11.0, "norm_limit": 110.0},
                    "dead": 41,
                    "dead_share": 0.02,
                    "dense_share_1pct": 0.31,
                    "dense_share_10pct": 0.0181,
                    "by_rate": by_rate if diffusion else [],
                    "intervals": {"explained_variance": interval(ev, 0.004), "l0": interval(31.7, 0.1), "cosine": interval(0.957, 0.002)},
                }

            sets = {"all": finished(100352, 0.91 - 0.02 * m - 0.01 * layer)}
            sets |= {"masked": finished(52000, 0.94), "visible": finished(48352, 0.88)} if diffusion else {"visible": finished(100352, 0.9)}
            write(
                f"fidelity-{slug}",
                {
                    "kind": "fidelity",
                    "version": 1,
                    "dictionary": name,
                    "model": model,
                    "site": f"resid_post@{layer}",
                    "k": 32,
                    "width": 2048,
                    "own": "all",
                    "enough_rows": True,
                    "sets": sets,
                },
            )

            rates, rows, recovered = (RATES if diffusion else [0.0]), [], []
            for rate in [*rates, None]:
                for condition, harm in CONDITIONS.items():
                    r = 0.5 if rate is None else rate
                    delta = harm * (1.2 - r) * (1 + 0.3 * m) - (0.03 if condition == "spliced" and r > 0.8 and m == 1 else 0)
                    rows.append(
                        {
                            "rate": rate,
                            "condition": condition,
                            "tokens": 7000,
                            "documents": 60,
                            "relative_change_quartiles": [0.2, 0.3, 0.4],
                            "loss": interval(2 + delta, 0.1),
                            "delta": interval(delta, 0.01 + 0.05 * harm),
                            "kl": interval(harm * 1.1 * (1.2 - 0.5 * r), 0.02 * harm),
                            "top1": interval(1 / (1 + harm), 0.01),
                        }
                    )
                recovered += [{"rate": rate, "baseline": b, **interval(v, 0.004)} for b, v in (("zero", 0.99), ("mean", 0.983))]
            write(
                f"delta-loss-{slug}",
                {
                    "kind": "delta_loss",
                    "version": 1,
                    "dictionary": name,
                    "model": model,
                    "site": f"resid_post@{layer}",
                    "objective": "masked tokens" if diffusion else "next token",
                    "predicts_next": m > 0,
                    "rates": rates,
                    "positions": "all",
                    "seed": 0,
                    "blocks": 64,
                    "block_length": 256,
                    "side": "test",
                    "unit": "nats per scored token",
                    "conditions": list(CONDITIONS),
                    "rows": rows,
                    "loss_recovered": recovered,
                    "forced": [],
                },
            )
            write(
                f"features-{slug}",
                {
                    "kind": "features",
                    "version": 1,
                    "dictionary": name,
                    "model": model,
                    "site": f"resid_post@{layer}",
                    "rows": 32768,
                    "blocks": 128,
                    "side": "test",
                    "seed": 0,
                    "select": "all",
                    "dead_share": 0.02,
                    "selection": "5 a density decile, seeded",
                    "mask_id": 0 if diffusion else None,
                    "pieces": pieces,
                    "records": some_records(rng, diffusion, latents, windows, length, len(words)),
                },
            )
    write("generation", a_generation(rng, len(words), pieces))
    return folder


def a_generation(rng: np.random.Generator, vocabulary: int, pieces: dict, prompt: int = 3, new: int = 12) -> dict:
    sides = {}
    for key in ("plain", "steered"):
        final = np.concatenate([np.arange(1, prompt + 1), rng.integers(1, vocabulary, new)])
        commit = np.concatenate([np.full(prompt, -1), rng.permutation(new)])
        history = [np.where(commit < s, final, 0).tolist() for s in range(new + 1)]
        grid = np.where(rng.random((new, prompt + new)) < 0.15, rng.random((new, prompt + new)) * (6 if key == "steered" else 2), 0)
        sides[key] = {
            "history": history,
            "commit_step": commit.tolist(),
            "confidence": np.where(commit < 0, 0, rng.random(len(commit))).round(4).tolist(),
            "activation": grid.round(4).tolist(),
        }
    return {
        "kind": "steered_generation",
        "version": 1,
        "dictionary": "pocket-dlm/resid_post@4_k32",
        "latent": 17,
        "site": "resid_post@4",
        "strength": 2.0,
        "prompt_length": prompt,
        "steps": new,
        "mask_id": 0,
        "pieces": pieces,
        "prompt": "def f",
        "sampler": "LLaDASampler(steps=12)",
        "scale": "corpus_max",
        "relative_size": [0.3 + 0.01 * s for s in range(new)],
        "dose": 4.2,
        **sides,
    }


@pytest.fixture
def make_run(tmp_path):
    """Writes a synthetic run into a fresh folder; options as for ``write_run``."""
    return lambda **options: write_run(tmp_path / "runs" / "made-up", **options)


@pytest.fixture(scope="session")
def write():
    """``write_run``, for a fixture that lives longer than a test."""
    return write_run


@pytest.fixture(scope="session")
def written_run(tmp_path_factory):
    """The folder of a synthetic run that no test changes."""
    return write_run(tmp_path_factory.mktemp("runs") / "made-up")


@pytest.fixture(scope="session")
def hostile():
    """Texts that try to leave the place where they are put."""
    return HOSTILE
