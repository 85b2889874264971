"""The shipped models are what their cards say, and the script that made them resumes."""

import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

from dlmscope_jax.data import builtin_blocks, load_tokenizer
from dlmscope_jax.diffusion import align_logits, corrupt, token_loss
from dlmscope_jax.models import load_model

ROOT = Path(__file__).parent.parent
POCKET = ROOT / "dlmscope_jax" / "pocket"
NAMES = ("pocket-dlm", "pocket-ar", "pocket-dream")


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_small_bfloat16_and_has_a_card(name):
    folder = POCKET / name
    assert (folder / "model.safetensors").stat().st_size < 8e6
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        assert {str(file.get_slice(key).get_dtype()) for key in file.keys()} == {"BF16"}
    assert load_tokenizer(name).digest == load_tokenizer("pocket-dlm").digest
    card = json.loads((folder / "card.json").read_text())
    assert card["model"] == name and card["checkpoints"][-1]["step"] == card["steps"]
    assert f"# {name}" in (folder / "README.md").read_text()
    assert len(json.loads((POCKET / "corpus.json").read_text())) > 400


def test_cards_compare_with_count_models():
    ar = json.loads((POCKET / "pocket-ar" / "card.json").read_text())["next_token"]
    assert ar["model"] < ar["bigram"] < ar["unigram"]
    for name in ("pocket-dlm", "pocket-dream"):
        card = json.loads((POCKET / name / "card.json").read_text())
        assert [row["rate"] for row in card["masked"]] == [round(0.05 + 0.1 * i, 2) for i in range(10)]
        assert all(row["model"] < row["unigram"] for row in card["masked"]) and card["elbo"] < card["masked"][0]["unigram"]


@pytest.mark.parametrize("name", NAMES)
def test_model_does_what_its_card_says(name):
    """A few test blocks: the loss is near the card's, not at the unigram's; the shift is that of the layout."""
    model, params = load_model(name)
    card = json.loads((POCKET / name / "card.json").read_text())
    blocks = builtin_blocks(load_tokenizer(name), 256, "test").take(slice(0, 8))
    tokens, keep = jnp.asarray(blocks.tokens), jnp.asarray(blocks.documents >= 0)
    if model.diffusion is None:
        expected, read, masked = card["next_token"]["model"], tokens, keep
    else:
        expected = next(row["model"] for row in card["masked"] if row["rate"] == 0.45)
        read, masked = corrupt(jax.random.key(0), tokens, 0.45, model.diffusion, protect=~keep, exact=True)
    loss = token_loss(model, params, read, tokens, masked, attention_mask=keep)
    assert abs(float(loss.sum() / (loss > 0).sum()) - expected) < 0.6
    if name == "pocket-dream":
        logits = model.apply(params, read, attention_mask=keep).logits
        right = lambda scores: float((scores.argmax(-1) == tokens)[masked].mean())  # noqa: E731
        assert right(align_logits(logits, model)[0]) > 2 * right(logits)


def script(name: str):
    """A script of ``scripts/`` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_training_script_resumes_where_it_was_stopped(tmp_path, monkeypatch):
    train = script("train_pocket")
    small = lambda tokenizer, length, side: builtin_blocks(tokenizer, length, side).take(slice(0, 16))  # noqa: E731
    monkeypatch.setattr(train, "builtin_blocks", small)
    shape = train.dataclasses.replace(train.SHAPE, n_layers=1, d_model=32, n_heads=2, n_kv_heads=2, head_dim=16, d_mlp=32)
    monkeypatch.setattr(train, "SHAPE", shape)
    monkeypatch.setattr(train, "STEPS", {"pocket-dlm": 4, "pocket-ar": 4, "pocket-dream": 4})
    monkeypatch.setattr(train, "EVERY", 2)
    monkeypatch.setattr(train, "HELD_OUT", 8)

    def run(work: str, stop_at: int | None = None, model: str = "pocket-dlm") -> None:
        monkeypatch.setattr(sys, "argv", ["train_pocket.py", model, "--work", str(tmp_path / work)])
        rows = train.lm.batch_rows
        with monkeypatch.context() as patch:
            if stop_at is not None:

                def stopping(spec, step, n_rows):
                    if step == stop_at:
                        raise KeyboardInterrupt
                    return rows(spec, step, n_rows)

                patch.setattr(train.lm, "batch_rows", stopping)
            train.main()

    run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop_at=3)
    run("stopped")
    folders = [tmp_path / work / "pocket-dlm-0" for work in ("whole", "stopped")]
    with np.load(folders[0] / "state.npz") as one, np.load(folders[1] / "state.npz") as two:
        assert one.files == two.files
        for leaf in one.files:
            np.testing.assert_array_equal(one[leaf], two[leaf])
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in folders]
    assert [row["step"] for row in logs[1]] == [2, 4] and [row["dev"] for row in logs[0]] == [row["dev"] for row in logs[1]]
    with pytest.raises(SystemExit, match="pocket-ar of seed 0"):
        run("whole", model="pocket-dream")
