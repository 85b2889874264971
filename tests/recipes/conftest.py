"""Tiny models in the layouts of the real ones, a small folder of text, and runs on them."""

import contextlib
import dataclasses
import io
import random
import shutil
from pathlib import Path

import jax
import pytest

import dlmscope_jax
from dlmscope_jax.models import DiffusionSpec, ModelConfig, Transformer, init_params, save_model
from dlmscope_jax.recipes.configs import Data, Dictionary, Evaluate, Harvest, Report, Run, Train
from dlmscope_jax.recipes.quickstart import quickstart

TINY = ModelConfig(
    family="llada", vocab_size=2048, d_model=16, n_layers=3, n_heads=2, n_kv_heads=2, head_dim=8, d_mlp=32, norm_eps=1e-5,
    rope_theta=10000.0, max_positions=64, attention="bidirectional", rope_float32=True, bos_id=0, eos_id=1, pad_id=2,
)  # fmt: skip
POCKET = Path(dlmscope_jax.__file__).parent / "pocket"


def tiny(family: str) -> Transformer:
    if family == "llada":
        return Transformer(TINY, DiffusionSpec(3, shift=False))
    if family == "dream":
        return Transformer(dataclasses.replace(TINY, family="dream", rope_float32=False, qkv_bias=True), DiffusionSpec(3, shift=True))
    return Transformer(dataclasses.replace(TINY, family="llama", rope_float32=False, attention="causal"))


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, str]:
    """``llada``, ``dream`` and ``llama``: folders with weights and the pocket tokenizer."""
    root = tmp_path_factory.mktemp("models")
    for i, family in enumerate(("llada", "dream", "llama")):
        model = tiny(family)
        save_model(root / family, model, init_params(model, jax.random.key(i)))
        for name in ("tokenizer.json", "tokenizer_config.json"):
            found = next(p for p in (POCKET / "pocket-dlm" / name, POCKET / name) if p.is_file())
            shutil.copy(found, root / family)
    return {family: str(root / family) for family in ("llada", "dream", "llama")}


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> str:
    """120 short texts that are not alike."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    words = [f"{a}{b}" for a in ("read", "write", "open", "close", "sum", "list", "name", "key") for b in ("", "_all", "er", "s")]
    for i in range(120):
        lines = []
        for _ in range(12):
            lines += [f"def {draw.choice(words)}({draw.choice(words)}):", f"    return {draw.choice(words)} + {draw.randrange(1000)}"]
        (folder / f"{i:03}.txt").write_text("\n".join(lines))
    return str(folder)


@pytest.fixture(scope="session")
def finished(model_folders, corpus, tmp_path_factory) -> tuple[Run, str]:
    """A run of three models that has been through everything, and what it printed; not to be written to."""
    run = a_run(model_folders, corpus, tmp_path_factory.mktemp("finished"))
    run = dataclasses.replace(run, models=tuple(model_folders[family] for family in ("llada", "dream", "llama")))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        quickstart(run)
    return run, out.getvalue()


@pytest.fixture
def finished_copy(finished, tmp_path) -> tuple[Run, Path]:
    """The finished run in a folder of its own, and that folder."""
    run = dataclasses.replace(finished[0], root=str(tmp_path / "runs"))
    folder = tmp_path / "runs" / run.name
    shutil.copytree(Path(finished[0].root) / run.name, folder)
    return run, folder


@pytest.fixture
def small_run(model_folders, corpus, tmp_path) -> Run:
    """A run of two models that takes seconds."""
    return a_run(model_folders, corpus, tmp_path)


@pytest.fixture(scope="session")
def make_run(model_folders, corpus):
    """A function from a folder to a small run in it, for fixtures that live longer than a test."""
    return lambda folder: a_run(model_folders, corpus, folder)


def a_run(model_folders: dict[str, str], corpus: str, folder: Path) -> Run:
    return Run(
        name="small",
        root=str(folder / "runs"),
        models=(model_folders["llada"], model_folders["llama"]),
        data=Data(path=corpus, block_length=32),
        harvest=Harvest(sites=("resid_post@0", "resid_post@1"), train_rows=2000, test_rows=600, batch_size=16),
        dictionary=Dictionary(width=32, k=(4,)),
        train=Train(steps=6, batch_size=128, lr=1e-3, checkpoint_every=3),
        evaluate=Evaluate(blocks=4, rates=(0.15, 0.45), batch_size=4),
        report=Report(latents=4, prompt="def read(", new_tokens=6),
    )
