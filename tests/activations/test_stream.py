"""Rows straight from the model are those of a store, in an order that any step can be begun in, and stay on the devices."""

from itertools import islice

import jax
import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStream, Corruption, harvest, stream
from dlmscope_jax.errors import UserError

from .conftest import tiny_blocks, tiny_model

SITES = ("resid_post@0", "mlp_act@1")
HALF = Corruption("rate", 0.3, 0.7)
BLOCKS = 61
SETTINGS = dict(seed=3, batch_size=8, buffer_rows=200, dtype="float32")


@pytest.fixture(scope="module")
def shifted():
    return tiny_model("shifted")


@pytest.fixture(scope="module")
def blocks():
    return tiny_blocks(BLOCKS)


@pytest.fixture(scope="module")
def source(shifted, blocks):
    return ActivationStream(*shifted, blocks, SITES, HALF, **SETTINGS)


@pytest.fixture(scope="module")
def store(shifted, blocks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("store") / "s"
    return harvest(*shifted, blocks, folder, SITES, HALF, seed=3, batch_size=8, dtype="float32")


def rows_of(batches, steps, site="resid_post@0"):
    return np.concatenate([np.asarray(batch[site]) for batch in islice(batches, steps)])


def matched(found, wanted):
    """For each found row how many of the wanted ones it is, up to rounding, and for each wanted one how often it was found."""
    distance = np.abs(found[:, None, :] - wanted[None, :, :]).max(axis=2)
    same = distance < 1e-5
    return same.sum(axis=1), same.sum(axis=0)


@pytest.mark.parametrize("select", ["all", "masked", "visible", "predicting"])
def test_an_epoch_is_the_harvest(source, store, select):
    flag = {"all": None, "masked": "is_masked", "visible": "is_masked", "predicting": "predicts_masked"}[select]
    keep = np.ones(store.rows, bool) if flag is None else store.column(flag) != (select == "visible")
    batches = source.batches(16, 5, select=select)
    assert batches.rows == keep.sum()
    # two epochs and some: all rows of the first have left
    found = [{site: np.asarray(batch[site]) for site in SITES} for batch in islice(batches, 3 * batches.rows // 16)]
    first, both = store.read("resid_post@0")[keep], np.concatenate([store.read(site)[keep] for site in SITES], axis=1)
    _, often = matched(np.concatenate([batch["resid_post@0"] for batch in found]), first)
    # masks differ in later epochs, but some rows come again: position 0 of a block whose other tokens are as they were
    assert (often >= 1).all() and (often == 1).mean() > 0.8
    # rows of several sites belong together
    together = np.concatenate([np.concatenate([batch[site] for site in SITES], axis=1) for batch in found])
    assert (matched(together, both)[1] >= 1).all()
    if select != "all":  # the buffer holds more than an epoch of these
        return
    # before an epoch's rows run out, there is no other one's, and none twice
    early, once = matched(np.concatenate([batch["resid_post@0"] for batch in found[: batches.rows // 16 // 4]]), first)
    assert early.min() >= 1 and once.max() == 1


def test_no_padding_and_clean_text(blocks):
    model, params = tiny_model("ar")
    clean = ActivationStream(model, params, blocks, SITES[:1], Corruption("clean"), batch_size=8, buffer_rows=200, dtype="float32")
    batches = clean.batches(16, 0)
    real = blocks.documents >= 0
    assert batches.rows == real.sum()
    wanted = np.asarray(model.apply(params, blocks.tokens, attention_mask=real, logits=False, collect=SITES[:1]).taps["resid_post"][0])
    hits, often = matched(rows_of(batches, 2 * batches.rows // 16), wanted[real])
    assert hits.min() >= 1 and often.min() >= 1


def test_a_step_is_the_same_from_wherever_it_is_begun(source):
    for select in ("all", "masked"):
        whole = list(islice(source.batches(16, 5, select=select), 60))
        for start in (1, 31, int(np.random.default_rng().integers(2, 59))):
            for one, other in zip(whole[start:], source.batches(16, 5, start, select=select), strict=False):
                for site in SITES:
                    assert np.asarray(one[site]).tobytes() == np.asarray(other[site]).tobytes(), (select, start)
    # a site alone is the same rows, another seed is another order
    assert (
        rows_of(source.batches(16, 5, sites=["mlp_act@1"]), 3, "mlp_act@1").tobytes()
        == rows_of(source.batches(16, 5), 3, "mlp_act@1").tobytes()
    )
    assert (rows_of(source.batches(16, 6), 3) != rows_of(source.batches(16, 5), 3)).any()


def test_masks_are_new_in_each_epoch(source):
    chosen = source.batches(16, 5)._chosen
    masks = [chosen._masked(epoch, np.arange(BLOCKS)) for epoch in range(3)]
    for one, other in ((0, 1), (1, 2), (0, 2)):
        assert 0.3 < (masks[one] != masks[other])[:, 1:6].mean() < 0.7
    assert all(not mask[:, 0].any() and 0.4 < mask[:, 1:6].mean() < 0.6 for mask in masks)
    np.testing.assert_array_equal(chosen._masked(1, np.array([4, 60])), masks[1][[4, 60]])


def test_identity_and_meta(source, store, shifted, blocks):
    assert source.meta == {name: value for name, value in store.meta.items() if name != "shard_blocks"}
    assert source.sites == dict(sorted({"resid_post@0": 8, "mlp_act@1": 16}.items()))
    same = ActivationStream(*shifted, blocks, SITES, HALF, **SETTINGS)
    assert same.identity == source.identity
    for change in (dict(seed=4), dict(batch_size=4), dict(buffer_rows=100), dict(dtype="bfloat16"), dict(meta={"tokenizer": "x"})):
        assert ActivationStream(*shifted, blocks, SITES, HALF, **(SETTINGS | change)).identity != source.identity
    assert ActivationStream(*shifted, blocks.take(slice(60)), SITES, HALF, **SETTINGS).identity != source.identity
    assert ActivationStream(*tiny_model("shifted", 1), blocks, SITES, HALF, **SETTINGS).identity != source.identity


def test_the_buffer_is_bounded_and_two_programs_are_enough(source):
    batches = source.batches(16, 5, select="masked")
    next(batches)
    programs = stream._filled._cache_size(), stream._taken._cache_size()
    capacity = batches.capacity
    # about what was asked for: the share of one pass more, and room for epochs with more masks
    assert capacity <= 1.5 * SETTINGS["buffer_rows"]
    live = len(jax.live_arrays())
    for _ in range(80):
        batch = next(batches)
    assert batches.capacity == capacity and {name: len(b) for name, b in batches._buffers.items()} == dict.fromkeys(SITES, capacity)
    assert (stream._filled._cache_size(), stream._taken._cache_size()) == programs
    del batch
    assert len(jax.live_arrays()) <= live + 4


def test_it_grows_where_a_later_epoch_needs_more(source, monkeypatch):
    wanted = rows_of(source.batches(16, 5, select="masked"), 60)
    monkeypatch.setattr(stream, "_ROOM", -0.3)
    batches = source.batches(16, 5, select="masked")
    before = batches.capacity
    assert rows_of(batches, 60).tobytes() == wanted.tobytes()
    assert batches.capacity > before


def test_no_activation_is_read_back(source, monkeypatch):
    """Nothing but masks comes to the host: every way in which an array's values can be read is watched."""
    batches = source.batches(16, 5, select="masked")
    next(batches)
    read = []
    array = type(jax.numpy.zeros(1))
    for name in ("__array__", "_value", "copy_to_host_async", "tolist", "item"):
        original = getattr(array, name)
        watch = lambda self, *a, original=original, **k: (read.append(self.shape), original(self, *a, **k))[1]  # noqa: E731
        if isinstance(original, property):
            watch = property(lambda self, original=original: (read.append(self.shape), original.fget(self))[1])
        monkeypatch.setattr(array, name, watch)
    asarray = np.asarray  # reads the memory of a CPU directly

    def watched(value, *a, **k):
        read.extend([value.shape] if isinstance(value, jax.Array) else [])
        return asarray(value, *a, **k)

    for name in ("asarray", "array"):
        monkeypatch.setattr(np, name, watched)
    with jax.transfer_guard_device_to_host("disallow"):
        found = [next(batches) for _ in range(40)]
    # masks are [blocks, 1] bytes of 8 positions, keys two words
    assert {shape for shape in read if shape[-1:] not in ((1,), (2,))} == set()
    np.asarray(found[0]["resid_post@0"])
    assert (16, 8) in read  # and the watch watches


def test_wrong_arguments(source, shifted, blocks):
    def make(**changes):
        arguments = dict(blocks=blocks, sites=SITES, corruption=HALF) | SETTINGS | changes
        return ActivationStream(*shifted, **arguments)

    for change, message in (
        (dict(sites=()), "at least one site"),
        (dict(sites=["resid_post@2"]), "layers 0 to 1"),
        (dict(batch_size=0), "batch_size is 0"),
        (dict(seed=-1), "seed is -1"),
        (dict(dtype="int8"), "'int8' is not known"),
        (dict(blocks=blocks.take(slice(0, 0))), "no blocks with text"),
        (dict(blocks=[1]), "all of them at once"),
    ):
        with pytest.raises(UserError, match=message):
            make(**change)
    with pytest.raises(UserError, match="'rate U.*' is not possible: use 'clean'"):
        ActivationStream(*tiny_model("ar"), blocks, SITES, HALF)
    for change, arguments, message in (
        ({}, dict(sites=["z@0"]), "no site 'z@0': it has mlp_act@1, resid_post@0"),
        ({}, dict(select="some"), "'some' is not known"),
        ({}, dict(batch_size=10_000), "an epoch has 462 rows to select as 'all' .* fewer than one batch of 10000"),
        (dict(corruption=Corruption("clean")), dict(select="masked"), "an epoch has 0 rows to select as 'masked'"),
        (dict(buffer_rows=20), {}, "buffer_rows is 20, less than the 58 rows of one forward pass"),
    ):
        with pytest.raises(UserError, match=message):
            make(**change).batches(**(dict(batch_size=16, seed=0) | arguments))
