"""How fast a store is read: shuffled batches against a sequential read of the same store, and what a training step notices of it.

    python scripts/bench_store.py --d 768 --gigabytes 0.5

``whole shards`` reads one shard after the other and does nothing with it; ``in order`` is ``store.read`` of the rows of one batch after
the other, without reading ahead; ``shuffled`` is what training reads, ``store.batches`` with its
default buffer, after the buffer is filled; ``followed`` is a reading in the order in which a store grows. All are warm (the
store fits the page cache) and are medians of interleaved rounds. MB are stored bytes, 10^6 of them: an int8 row comes back four times as
large. ``--training`` adds a training step: alone on one batch that is there, with batches from the store, and with batches from the store
for two dictionaries, which share one read.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dlmscope_jax.activations import ActivationStore
from dlmscope_jax.training.heap import keep_freed_memory

SITE = "resid_post@0"


def main() -> None:
    """Reads the arguments and prints a table for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d", type=int, default=768, help="width of a row")
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16", "int8"])
    parser.add_argument("--gigabytes", type=float, default=0.5, help="size of each store")
    parser.add_argument("--batch", type=int, default=2048, help="rows of a batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the stores go (default: a temporary folder)")
    parser.add_argument("--training", action="store_true", help="also time a training step with and without reading")
    arguments = parser.parse_args()
    keep_freed_memory()  # as the command line does
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for dtype in arguments.dtypes:
            store = written(Path(folder) / dtype, dtype, arguments.d, arguments.gigabytes)
            throughput(store, arguments.batch, arguments.rounds)
            if arguments.training:
                training(store, arguments.batch, arguments.rounds)


def written(url: Path, dtype: str, d: int, gigabytes: float) -> ActivationStore:
    """A store of random rows of about that size."""
    store = ActivationStore.create(url, {SITE: d}, dtype=dtype)
    draw = np.random.default_rng(0)
    rows = draw.standard_normal((store.shard_rows, d), np.float32).astype(store.dtype)
    at = 0
    while at * d * store.stored_dtype.itemsize < gigabytes * 1e9:
        store.append({SITE: np.roll(rows, at, axis=1)}, {"number": np.arange(at, at + len(rows), dtype=np.int32)})
        at += len(rows)
    return store.finish()


def throughput(store: ActivationStore, batch: int, rounds: int) -> None:
    """One line for each way of reading."""
    width = store.sites[SITE] * store.stored_dtype.itemsize
    count = max(16, min(store.rows, 1 << 16) // batch)
    readers = {
        "shuffled": store.batches(batch, 0, columns=()),
        "followed": store.batches(batch, 0, columns=(), follow=True),
    }
    shards = itertools.cycle(store.shards)
    times: dict[str, list[float]] = {name: [] for name in ("whole shards", "in order", *readers)}
    for reader in readers.values():
        next(reader)
    for _ in range(rounds):
        start, rows = time.perf_counter(), 0
        while rows < count * batch:
            shard = next(shards)
            store.read_chunks(SITE, [(shard.shard, 0, shard.rows)])
            rows += shard.rows
        times["whole shards"].append(rows * width / (time.perf_counter() - start))
        start = time.perf_counter()
        for at in range(0, count * batch, batch):
            store.read(SITE, at, at + batch)
        times["in order"].append(count * batch * width / (time.perf_counter() - start))
        for name, reader in readers.items():
            drained(reader)
            start = time.perf_counter()
            for _ in range(count):
                next(reader)
            times[name].append(count * batch * width / (time.perf_counter() - start))
    for reader in readers.values():
        reader.close()
    print(f"{store.stored_dtype.name}, d {store.sites[SITE]}, {store.rows:,} rows, {store.nbytes / 1e6:,.0f} MB, batches of {batch}")
    base = statistics.median(times["in order"])
    for name, rates in times.items():
        middle = statistics.median(rates)
        print(
            f"  {name:<12}  {middle / 1e6:7,.0f} MB/s  ({min(rates) / 1e6:,.0f} to {max(rates) / 1e6:,.0f})  {100 * middle / base:4.0f} %"
        )


def drained(reader: Iterator) -> None:
    """Takes what waits in the reader's queue, which would not be read in the time that is measured."""
    for _ in range(2 * 8):
        next(reader)


def training(store: ActivationStore, batch: int, rounds: int) -> None:
    """Milliseconds of a training step with the batch there, and with batches from the store."""
    import jax

    from dlmscope_jax.dictionaries import TopK
    from dlmscope_jax.training import TrainSpec, init_state, make_step

    d, batch = store.sites[SITE], min(batch, 512)
    specs = [TrainSpec(TopK(d, 2 * d, 32), steps=10**6, batch_size=batch, seed=seed) for seed in range(2)]
    steps, states = [make_step(spec) for spec in specs], [init_state(spec) for spec in specs]
    reader = store.batches(batch, 0, columns=())
    held = next(reader)[SITE]

    def one(rows: np.ndarray, n: int) -> None:
        rows = jax.device_put(rows)
        for i in range(n):
            states[i], metrics = steps[i](states[i], rows)
        jax.block_until_ready(metrics)

    kinds = {
        "alone": lambda: one(held, 1),
        "reading": lambda: one(next(reader)[SITE], 1),
        "two alone": lambda: one(held, 2),
        "two reading": lambda: one(next(reader)[SITE], 2),
    }
    for run in kinds.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, run in kinds.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    reader.close()
    for name, found in times.items():
        print(f"  step, {name:<12} {1000 * statistics.median(found):8.1f} ms")


if __name__ == "__main__":
    main()
