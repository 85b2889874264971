"""A harvest's rows are the model's activations under the stated corruption, whatever interrupted it."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore, Corruption, harvest, rows_of
from dlmscope_jax.activations.forward import block_rates
from dlmscope_jax.activations.harvesting import blocks_digest
from dlmscope_jax.errors import Preempted, UserError
from dlmscope_jax.models import process_weights

from .conftest import LENGTH, MASK, tiny_blocks, tiny_model

ROOT = Path(__file__).resolve().parents[2]
SITES = ("resid_post@0", "mlp_act@1", "final_norm")
HALF = Corruption("rate", 0.3, 0.7)


def columns_of(store):
    return {name: store.column(name) for name in store.columns}


def grid(blocks, column, fill):
    """A column as [blocks, T], with ``fill`` at padding."""
    found = np.full(blocks.tokens.shape, fill, column.dtype)
    found[blocks.documents >= 0] = column
    return found


@pytest.mark.some(1)
@pytest.mark.parametrize("kind", ["dlm", "shifted"])
def test_rows_are_what_the_model_computes_on_what_the_columns_say(tmp_path, blocks, kind):
    model, params = tiny_model(kind)
    seen = []
    settings = dict(seed=3, batch_size=4, meta={"model": kind}, dtype="float32")
    store = harvest(model, params, blocks, tmp_path / "s", SITES, HALF, **settings, progress=seen.append)
    real = blocks.documents >= 0
    assert store.complete and store.rows == rows_of(blocks) == real.sum() == sum(seen)
    assert store.sites == {"final_norm": 8, "mlp_act@1": 16, "resid_post@0": 8}
    column = columns_of(store)
    for name, whole in {
        "original": blocks.tokens,
        "document": blocks.documents,
        "position": np.arange(LENGTH)[None] + 0 * blocks.tokens,
        "block": np.arange(len(blocks))[:, None] + 0 * blocks.tokens,
    }.items():
        np.testing.assert_array_equal(column[name], whole[real], err_msg=name)
    masked = grid(blocks, column["is_masked"], False)
    assert not masked[:, 0].any() and 0.3 < masked[:, 1:].mean() < 0.7
    np.testing.assert_array_equal(column["token"], np.where(column["is_masked"], MASK, column["original"]))
    predicts = masked if kind == "dlm" else np.concatenate([masked[:, 1:], np.zeros((len(blocks), 1), bool)], 1)
    np.testing.assert_array_equal(column["predicts_masked"], predicts[real])
    # the columns alone reproduce the activations
    tokens = grid(blocks, column["token"], 2)
    out = model.apply(params, tokens, attention_mask=jnp.asarray(real), logits=False, collect=SITES)
    for site, layer in (("resid_post", 0), ("mlp_act", 1), ("final_norm", 2)):
        name = site if site == "final_norm" else f"{site}@{layer}"
        np.testing.assert_allclose(store.read(name), np.asarray(out.taps[site][layer])[real], atol=1e-5, rtol=1e-5)
    assert store.meta["model"] == kind and store.meta["seed"] == 3 and store.meta["blocks"]["digest"] == blocks_digest(blocks)
    assert store.meta["corruption"] == {"policy": "rate", "low": 0.3, "high": 0.7}
    assert len(store.meta["model_identity"]) == 16 and set(store.meta["versions"]) == {"dlmscope_jax", "jax", "numpy"}


def test_heads_stand_one_after_the_other(tmp_path, blocks, dlm):
    store = harvest(*dlm, blocks, tmp_path / "s", ["z@1", "mlp_norm_scale@0"], HALF, batch_size=4, dtype="float32")
    assert store.sites == {"mlp_norm_scale@0": 1, "z@1": 8}
    real = blocks.documents >= 0
    tokens = grid(blocks, store.column("token"), 2)
    z = dlm[0].apply(dlm[1], tokens, attention_mask=jnp.asarray(real), logits=False, collect=("z@1",)).taps["z"][1]
    np.testing.assert_allclose(store.read("z@1"), np.asarray(z).reshape(*real.shape, 8)[real], atol=1e-5)
    with pytest.raises(UserError, match="attn_pattern@0' has no fixed width"):
        harvest(*dlm, blocks, tmp_path / "t", ["attn_pattern@0"], HALF)


def test_a_store_says_whether_the_weights_were_folded(tmp_path, blocks):
    raw = tiny_model("ar")
    folded, clean = process_weights(*raw), Corruption("clean")
    assert harvest(*raw, blocks, tmp_path / "raw", SITES[:1], clean).meta["weight_processing"] == "raw"
    assert harvest(*folded, blocks, tmp_path / "folded", SITES[:1], clean).meta["weight_processing"] == "folded"
    with pytest.raises(UserError, match="made with weight processing raw, this harvest has folded"):
        harvest(*folded, blocks, tmp_path / "raw", SITES[:1], clean)


def test_a_store_from_before_that_was_recorded_is_one_of_raw_weights(tmp_path, blocks, dlm, monkeypatch):
    create = ActivationStore.create
    forget = lambda url, sites, meta, *rest: create(url, sites, {k: v for k, v in meta.items() if k != "weight_processing"}, *rest)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(ActivationStore, "create", forget)
        old = harvest(*dlm, blocks, tmp_path / "s", SITES[:1], HALF)
    assert "weight_processing" not in old.meta
    assert harvest(*dlm, blocks, tmp_path / "s", SITES[:1], HALF).rows == old.rows


def test_batches_and_shards_do_not_change_the_rows(tmp_path, blocks, dlm):
    made = [
        harvest(*dlm, blocks, tmp_path / str(i), SITES[:1], HALF, batch_size=size, shard_blocks=shard)
        for i, (size, shard) in enumerate([(4, None), (5, 2), (64, 7)])
    ]
    for other in made[1:]:
        assert len(other.shards) == {2: 11, 7: 3}[other.meta["shard_blocks"]]
        for name, values in columns_of(made[0]).items():
            np.testing.assert_array_equal(other.column(name), values, err_msg=name)
        np.testing.assert_allclose(
            other.read("resid_post@0").astype(float), made[0].read("resid_post@0").astype(float), rtol=2**-7, atol=1e-4
        )
    other = harvest(*dlm, blocks, tmp_path / "seed", SITES[:1], HALF, seed=1, batch_size=4)
    assert (other.column("is_masked") != made[0].column("is_masked")).any()


def test_blocks_without_padding_need_no_attention_mask(tmp_path, dlm):
    whole = tiny_blocks(6).take(np.array([1, 2, 3, 4]))
    store = harvest(*dlm, whole, tmp_path / "s", ["blocks.1.hook_resid_post"], Corruption("clean"), batch_size=3, dtype="float32")
    out = dlm[0].apply(dlm[1], whole.tokens, logits=False, collect=("resid_post@1",))
    np.testing.assert_allclose(store.read("resid_post@1"), np.asarray(out.taps["resid_post"][1]).reshape(-1, 8), atol=1e-5)
    assert not store.column("is_masked").any() and not store.column("rate").any()
    np.testing.assert_array_equal(store.column("token"), store.column("original"))


def test_an_autoregressive_model_reads_clean_text(tmp_path, blocks):
    model, params = tiny_model("ar")
    with pytest.raises(UserError, match=r"no mask token, so 'rate U\[0.05, 1\]' is not possible: use 'clean'"):
        harvest(model, params, blocks, tmp_path / "s", SITES, Corruption())
    assert not (tmp_path / "s").exists()
    store = harvest(model, params, blocks, tmp_path / "s", SITES, Corruption("clean"), batch_size=4)
    assert store.dtype == "bfloat16" and not store.column("predicts_masked").any()


def rates(policy, n, low=0.05, high=1.0, seed=0):
    return np.asarray(block_rates(policy, jax.random.key(seed), jnp.arange(n), low, high))


def test_rates_are_stratified_uniform_and_belong_to_the_block():
    found = rates("rate", 1600)
    place = (found - 0.05) / 0.95
    for window in place.reshape(-1, 16):  # one block in each sixteenth of the range
        assert sorted((window * 16).astype(int)) == list(range(16))
    within = place * 16 % 1
    assert abs(within.mean() - 0.5) < 0.03 and abs(within.std() - 12**-0.5) < 0.02
    assert abs(np.corrcoef(place[:-1], place[1:])[0, 1]) < 0.15 and len(np.unique(found)) == 1600
    orders = {tuple((w * 16).astype(int)) for w in place.reshape(-1, 16)}
    assert len(orders) == 100
    some = np.array([5, 77, 1234])
    np.testing.assert_array_equal(np.asarray(block_rates("rate", jax.random.key(0), jnp.asarray(some), 0.05, 1.0)), found[some])
    assert (rates("rate", 1600, seed=1) != found).any()


def test_batch_rates_are_one_a_batch_of_eight():
    found = rates("batch_rate", 8000, 0.05, 0.5).reshape(-1, 8)
    assert (found == found[:, :1]).all() and len(np.unique(found)) == 1000
    assert 0.05 <= found.min() and found.max() <= 0.5 and abs(found.mean() - 0.275) < 0.02
    assert (rates("clean", 5) == 0).all()


def test_the_share_of_masks_follows_the_rate(tmp_path, dlm):
    many = replace(tiny_blocks(1), tokens=np.full((400, LENGTH), 9, np.int32), documents=np.zeros((400, LENGTH), np.int32))
    store = harvest(*dlm, many, tmp_path / "s", SITES[:1], Corruption("rate", 0.0, 1.0), batch_size=50)
    rate, masked = (store.column(name).reshape(400, LENGTH)[:, 1:] for name in ("rate", "is_masked"))
    low = rate < 0.25
    assert abs(masked[low].mean() - rate[low].mean()) < 0.04 and abs(masked.mean() - 0.5) < 0.03
    assert (np.diff(rate, axis=1) == 0).all()


def test_corruption_checks_itself():
    for arguments, message in (
        (("noise",), "'noise' is not known: use one of clean, rate, batch_rate"),
        (("rate", 0.5, 0.2), "low <= high"),
    ):
        with pytest.raises(UserError, match=message):
            Corruption(*arguments)
    assert [str(c) for c in (Corruption(), Corruption("clean"), Corruption("batch_rate", 0.05, 0.5))] == [
        "rate U[0.05, 1]",
        "clean",
        "batch_rate U[0.05, 0.5]",
    ]


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.endswith(".__lock")}


def test_a_finished_harvest_is_reused(tmp_path, blocks, dlm, monkeypatch):
    arguments = (*dlm, blocks, tmp_path / "s", SITES[:1], HALF)
    harvest(*arguments, batch_size=4)
    before = tree(tmp_path / "s")

    def never(*_, **__):
        raise AssertionError("the model ran")

    monkeypatch.setattr("dlmscope_jax.activations.harvesting.forward", never)
    again = harvest(*arguments, batch_size=8)
    assert again.complete and again.rows == rows_of(blocks) and tree(tmp_path / "s") == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model="other"), "made with model identity [0-9a-f]{16}, this harvest has [0-9a-f]{16}"),
        (dict(seed=1), "made with seed 0, this harvest has 1"),
        (dict(sites=SITES), r"made with sites \['resid_post@0'\], this harvest has"),
        (dict(corruption=Corruption("clean")), "made with corruption .*'rate'.*, this harvest has .*'clean'"),
        (dict(meta={"tokenizer": "bbb"}), "made with tokenizer aaa, this harvest has bbb"),
        (dict(blocks=21), r"made with blocks 21 x 8 train \([0-9a-f]{12}\), this harvest has 21 x 8 train"),
        (dict(dtype="float32"), "made with dtype bfloat16, this harvest has float32"),
    ],
)
def test_a_store_made_otherwise_is_refused(tmp_path, blocks, dlm, change, message):
    harvest(*dlm, blocks, tmp_path / "s", SITES[:1], HALF, meta={"tokenizer": "aaa"})
    before = tree(tmp_path / "s")
    model, params = tiny_model("dlm", 1) if "model" in change else dlm
    with pytest.raises(UserError, match=message):
        harvest(
            model,
            params,
            tiny_blocks(seed=1) if "blocks" in change else blocks,
            tmp_path / "s",
            change.get("sites", SITES[:1]),
            change.get("corruption", HALF),
            seed=change.get("seed", 0),
            meta=change.get("meta", {"tokenizer": "aaa"}),
            dtype=change.get("dtype", "bfloat16"),
        )
    assert tree(tmp_path / "s") == before


def test_somebody_elses_rows_are_not_harvested_into(tmp_path, blocks, dlm):
    store = ActivationStore.create(tmp_path / "s", {"resid_post@0": 8})
    store.append({"resid_post@0": np.zeros((3, 8))})
    with pytest.raises(UserError, match="was made with model identity nothing"):
        harvest(*dlm, blocks, tmp_path / "s", SITES[:1], HALF)


def test_wrong_input(tmp_path, blocks, dlm):
    for change, message in (
        (dict(sites=()), "at least one site"),
        (dict(sites=["resid_post@2"]), "layers 0 to 1"),
        (dict(batch_size=0), "batch_size 0"),
        (dict(dtype="float64"), "'float64'"),
        (dict(shard_blocks=0), "shard_blocks is 0"),
        (dict(blocks=replace(blocks, tokens=blocks.tokens + 40)), "made with another tokenizer"),
        (dict(blocks=replace(blocks, documents=0 * blocks.documents - 1)), "no blocks with text"),
        (dict(blocks=blocks.take(slice(0, 0))), "no blocks with text"),
    ):
        arguments = dict(blocks=blocks, url=tmp_path / "s", sites=SITES, corruption=HALF) | change
        with pytest.raises(UserError, match=message):
            harvest(*dlm, **arguments)
    assert not (tmp_path / "s").exists()


def test_only_what_was_damaged_is_computed_again(tmp_path, blocks, dlm):
    arguments = dict(sites=SITES[:1], corruption=HALF, batch_size=4, shard_blocks=4)
    harvest(*dlm, blocks, tmp_path / "s", **arguments)
    before = tree(tmp_path / "s")
    path = tmp_path / "s/sites/resid_post@0/c/2/0"
    path.write_bytes(path.read_bytes()[:100] + b"!" + path.read_bytes()[101:])
    store = ActivationStore.open(tmp_path / "s")
    assert store.verify() == (2,)
    store.forget([2])
    seen = []
    harvest(*dlm, blocks, tmp_path / "s", **arguments, progress=seen.append)
    assert seen == [rows_of(blocks) - 4 * LENGTH + 2, 4 * LENGTH - 2]
    assert tree(tmp_path / "s") == before


def test_no_new_compilation_for_new_numbers(tmp_path, blocks, dlm):
    from dlmscope_jax.activations.forward import forward

    harvest(*dlm, blocks, tmp_path / "0", SITES[:1], HALF, batch_size=4)
    before = forward._cache_size()
    harvest(*dlm, tiny_blocks(9, seed=2), tmp_path / "1", SITES[:1], Corruption("rate", 0.2, 0.4), seed=5, batch_size=4)
    harvest(dlm[0], tiny_model("dlm", 4)[1], blocks, tmp_path / "2", SITES[:1], HALF, batch_size=4)
    assert forward._cache_size() == before


KILLED = """
import os, sys, time
sys.path.insert(0, {tests!r})
from activations.conftest import tiny_blocks, tiny_model
from dlmscope_jax.activations import Corruption, harvest

calls = 0

def slowly(rows):
    global calls
    calls += 1
    print(rows, flush=True)
    time.sleep(1000 if calls == 13 else 0.02)

harvest(*tiny_model("dlm"), tiny_blocks(60), {url!r}, ("resid_post@0", "resid_post@1"), Corruption("rate", .3, .7), batch_size=4,
        shard_blocks=8, progress=slowly)
print("finished", flush=True)
"""


def test_killed_at_any_moment_it_ends_with_the_same_bytes(tmp_path):
    """``kill -9`` of a real process, several times, then a resume to the end."""
    url = tmp_path / "killed"
    undisturbed = tmp_path / "undisturbed"
    arguments = dict(sites=("resid_post@0", "resid_post@1"), corruption=HALF, batch_size=4, shard_blocks=8)
    harvest(*tiny_model("dlm"), tiny_blocks(60), undisturbed, **arguments)
    committed = []
    for lines, shards in ((5, 0), (3, 2)):  # the first at once, the second when there is something to keep
        process = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(KILLED.format(url=str(url), tests=str(ROOT / "tests")))],
            cwd=ROOT,
            env=dict(os.environ),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        heard = [process.stdout.readline() for _ in range(lines)]
        manifest = url / "manifest.jsonl"
        while shards and not (manifest.exists() and manifest.read_text().count("\n") >= shards):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL and "finished" not in "".join(heard)
        with pytest.raises(UserError, match="not finished"):
            ActivationStore.open(url)
        partly = ActivationStore.open(url, allow_incomplete=True)
        committed.append(partly.rows)
        assert partly.verify() == ()
        whole = ActivationStore.open(undisturbed)
        np.testing.assert_array_equal(partly.column("block"), whole.column("block")[: partly.rows])
        (url / "sites/resid_post@0/c/7").mkdir(parents=True, exist_ok=True)
        (url / "sites/resid_post@0/c/7/0").write_bytes(b"half a shard")  # as if killed while writing the last one
    assert committed[0] <= committed[1] and 0 < committed[1] < rows_of(tiny_blocks(60))
    seen = []
    harvest(*tiny_model("dlm"), tiny_blocks(60), url, **arguments, progress=seen.append)
    assert seen[0] == committed[1] and sum(seen) == rows_of(tiny_blocks(60))
    assert tree(url) == tree(undisturbed)


def test_killed_while_its_shards_are_written(tmp_path, blocks, dlm):
    """Every state that a kill between two writes can leave behind leads to the same store."""
    arguments = dict(sites=SITES[:1], corruption=HALF, batch_size=4, shard_blocks=4)
    harvest(*dlm, blocks, tmp_path / "whole", **arguments)
    whole = tree(tmp_path / "whole")
    lines = whole["manifest.jsonl"].splitlines(keepends=True)
    states = {
        "before COMPLETE": ["COMPLETE"],
        "before the first commit": ["COMPLETE", "manifest.jsonl"],
        "between two arrays": ["COMPLETE", "manifest.jsonl", "columns/rate"],
        "only the header": ["COMPLETE", "manifest.jsonl", "sites", "columns"],
        "before the last commit": ["COMPLETE"],
    }
    for name, missing in states.items():
        at = tmp_path / name.replace(" ", "-")
        shutil.copytree(tmp_path / "whole", at)
        for part in missing:
            shutil.rmtree(at / part) if (at / part).is_dir() else (at / part).unlink()
        if name == "before the last commit":
            (at / "manifest.jsonl").write_bytes(b"".join(lines[:-1]))
        harvest(*dlm, blocks, at, **arguments)
        assert tree(at) == whole, name


def test_progress_is_counted_while_it_runs(tmp_path, blocks, dlm):
    times = []
    harvest(*dlm, blocks, tmp_path / "s", SITES[:1], HALF, batch_size=4, progress=lambda rows: times.append((rows, time.monotonic())))
    assert len(times) == 6


class Windows:
    """The blocks four at a time, as a stream gives them; remembers who asked for what."""

    window, side, digest, padded = 4, "train", "d", True

    def __init__(self, blocks):
        self.blocks, self.length, self.asked = blocks, blocks.tokens.shape[1], []

    def __len__(self):
        return len(self.blocks)

    def take(self, rows):
        self.asked.append((rows.start, rows.stop))
        return self.blocks.take(rows)


def test_blocks_that_come_in_windows(tmp_path, blocks, dlm):
    documents = blocks.documents.copy()
    documents[4:8], documents[18:] = -1, -1  # a window without text, and none at the end of the last one
    padded = replace(blocks, documents=documents)
    windows = Windows(padded)
    store = harvest(*dlm, windows, tmp_path / "s", SITES[:1], HALF, batch_size=3, dtype="float32")
    assert windows.asked == [(0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 21)]
    assert store.meta["blocks"] == {"digest": "d", "count": 21, "length": LENGTH, "side": "train"} and store.meta["shard_blocks"] == 4
    whole = harvest(*dlm, padded, tmp_path / "t", SITES[:1], HALF, batch_size=3, dtype="float32", shard_blocks=4)
    assert store.rows == whole.rows == rows_of(padded)
    for name in store.columns:
        np.testing.assert_array_equal(store.column(name), whole.column(name))
    np.testing.assert_array_equal(store.read("resid_post@0"), whole.read("resid_post@0"))
    store.forget([0, 4])
    again = Windows(padded)
    assert harvest(*dlm, again, tmp_path / "s", SITES[:1], HALF, batch_size=3, dtype="float32").rows == whole.rows
    assert again.asked == [(0, 4), (16, 20)]
    with pytest.raises(UserError, match="shard_blocks is 5, but the blocks come in windows of 4"):
        harvest(*dlm, windows, tmp_path / "u", SITES[:1], HALF, shard_blocks=5)
    windows.blocks = replace(padded, tokens=padded.tokens + 40)
    with pytest.raises(UserError, match="made with another tokenizer"):
        harvest(*dlm, windows, tmp_path / "u", SITES[:1], HALF)


def test_sigterm_ends_a_harvest_cleanly_and_the_same_call_goes_on(tmp_path, dlm):
    """In the first pass, within a shard, and in the last one."""
    some = tiny_blocks(21)
    settings = dict(seed=3, batch_size=2, shard_blocks=4, dtype="float32")
    whole = harvest(*dlm, some, tmp_path / "whole", SITES, HALF, **settings)
    before = signal.getsignal(signal.SIGTERM)
    for stop, least in ((1, 0), (5, 2), (11, 6)):
        seen = []

        def progress(rows, seen=seen, stop=stop):
            seen.append(rows)
            if len(seen) == stop:
                os.kill(os.getpid(), signal.SIGTERM)

        place = tmp_path / str(stop)
        with pytest.raises(Preempted) as raised:
            harvest(*dlm, some, place, SITES, HALF, **settings, progress=progress)
        assert signal.getsignal(signal.SIGTERM) is before
        there = ActivationStore.open(place, allow_incomplete=True)
        if stop == 11:
            assert there.complete and str(raised.value) == "SIGTERM: this harvest is done; the same command goes on from there"
        else:  # one pass is ahead
            assert least <= len(there.shards) <= least + 1 and not there.complete
            assert str(raised.value).startswith(f"SIGTERM: {len(there.shards)} of 6 shards are harvested")
        store = harvest(*dlm, some, place, SITES, HALF, **settings)
        for name in SITES:
            np.testing.assert_array_equal(store.read(name), whole.read(name))
        assert [shard.digest for shard in store.shards] == [shard.digest for shard in whole.shards]
