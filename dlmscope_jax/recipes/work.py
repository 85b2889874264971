"""A run at work: its folder, and the models, texts and results that the verbs share."""

import dataclasses
import functools
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dlmscope_jax import config, distributed
from dlmscope_jax.data import Blocks, Document, StreamedBlocks, Tokenizer, builtin_blocks, load_tokenizer, on_side, pack, read_documents
from dlmscope_jax.data.worlds import World
from dlmscope_jax.errors import UserError
from dlmscope_jax.models import load_model, process_weights

from .configs import Run
from .meshes import mesh_of

Side = Literal["train", "test"]
SIDES: tuple[Side, ...] = ("train", "test")


class Work:
    """The folder of a run, and what its stages would otherwise load again.

    One language model is held at a time: the run goes model by model, and two large ones need not fit.
    """

    def __init__(self, run: Run):
        self.run = run
        self.folder = Path(run.root) / run.name
        self._worlds = {world.name: world for world in run.synthetic}
        self.names = tuple(self._worlds) or run.models
        self.labels = {name: name for name in self._worlds} or _labels(run.models)
        self._model: tuple[str, Any, Any] | None = None
        self._blocks: dict[tuple[str, str], Blocks] = {}
        self._documents: list[Document] | None = None

    @functools.cached_property
    def mesh(self) -> Any:
        """The devices that the work is divided over, None for one."""
        return mesh_of(self.run.mesh)

    def store_url(self, name: str, side: str) -> Path:
        """Where the rows of a model's side lie."""
        return self.folder / "harvest" / self.labels[name] / side

    def dictionaries(self, name: str) -> Path:
        """Where the trained dictionaries of a model lie."""
        return self.folder / "dictionaries" / self.labels[name]

    def world(self, name: str) -> World | None:
        """The synthetic world of that name, if it is one and no model."""
        if name not in self._worlds:
            return None
        given = dataclasses.asdict(self._worlds[name])
        del given["name"]
        return World(**given)

    def model(self, name: str) -> tuple[Any, dict]:
        """A language model and its parameters."""
        if self._model is None or self._model[0] != name:
            self._model = None  # let go of the last one before the next is read
            model, params = load_model(name, dtype=self.run.dtype, mesh=self.mesh)
            if self.run.weight_processing == "folded":
                model, params = process_weights(model, params)
            self._model = (name, model, params)
        return self._model[1:]

    def tokenizer(self, name: str) -> Tokenizer:
        """A model's tokenizer."""
        return load_tokenizer(name)

    def blocks(self, name: str, side: Side) -> Blocks:
        """All blocks of one side of the run's text, in a model's tokens."""
        tokenizer, data = self.tokenizer(name), self.run.data
        if data.stream:
            raise UserError(f"data.stream: {data.path} is never held as a whole, which this needs: set it to false")
        if (tokenizer.digest, side) not in self._blocks:
            if data.path == "builtin":
                found = builtin_blocks(tokenizer, data.block_length, side)
            else:
                if self._documents is None:
                    self._documents = read_documents(data.path, data.text)
                documents = on_side(self._documents, side)
                if not documents:
                    count = len(self._documents)
                    raise UserError(f"data.path: none of the {count} documents of {data.path} is on the {side} side: give more text")
                found = pack(documents, tokenizer, data.block_length)
            self._blocks[tokenizer.digest, side] = found
        return self._blocks[tokenizer.digest, side]

    def some_blocks(self, name: str, side: Side, rows: int, purpose: int = 0, repeat: bool = False) -> Blocks:
        """A random choice of blocks with at least so many tokens; all of them where there are fewer and ``repeat`` is off.

        Of a stream the first blocks of as many lanes as that takes.
        """
        if self.run.data.stream:
            return _held(self.stream(name, side, rows, 1), purpose)
        blocks = self.blocks(name, side)
        order = np.random.default_rng([self.run.seed, SIDES.index(side), purpose]).permutation(len(blocks))
        real = (blocks.documents >= 0).sum(axis=1)[order]
        while repeat and real.sum() < rows:
            order, real = np.concatenate([order, order]), np.concatenate([real, real])
        enough = int(np.searchsorted(np.cumsum(real), rows)) + 1
        return blocks.take(order[:enough])

    def stream(self, name: str, side: Side, rows: int, window: int, notes: Path | None = None) -> StreamedBlocks:
        """Blocks with so many tokens, a window at a time; text that has ended is read again.

        Args:
          name: the language model.
          side: of the text.
          rows: tokens.
          window: blocks of a window.
          notes: a folder for the cursors.
        """
        data, tokenizer = self.run.data, self.tokenizer(name)
        return StreamedBlocks(data.path, tokenizer, data.block_length, side, -(-rows // data.block_length), window, data.text, True, notes)

    def read(self, kind: str, dictionary: str, inputs: Any) -> dict | None:
        """A result on disk, if it was measured from these inputs.

        Args:
          kind: what it is; part of the file's name.
          dictionary: the dictionary's folder below ``dictionaries/``.
          inputs: JSON of everything that the result depends on.
        """
        path = self._result_path(kind, dictionary)
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a damaged one is measured again
            return None
        return found if found.get("inputs") == _stamp(inputs) else None

    def write(self, kind: str, dictionary: str, inputs: Any, result: dict) -> None:
        """Keeps a result for ``read`` and for the report; of several processes, the first does."""
        if not distributed.is_first():
            return
        whole = {**result, "kind": kind, "dictionary": dictionary, "inputs": _stamp(inputs)}
        write_whole(self._result_path(kind, dictionary), json.dumps(whole))

    def _result_path(self, kind: str, dictionary: str) -> Path:
        return self.folder / "results" / f"{dictionary.replace('/', '.')}.{kind}.json"

    @contextmanager
    def stage(self, verb: str, model: str) -> Iterator["Stage"]:
        """Times what a verb does for a model; a stage that finds its work done keeps the time of when it was done."""
        stage, start = Stage(), time.monotonic()
        yield stage
        if not stage.reused:
            entry = {"stage": f"{verb} {self.labels[model]}", "seconds": round(time.monotonic() - start, 1)}
            self.note(times=[entry | ({"rows": stage.rows} if stage.rows else {})])

    def note(self, **entries: Any) -> None:
        """Adds to ``results/run.json``, the run's summary. Lists are of mappings, one for each ``name`` or ``stage``.

        The configuration is written with it: once something was done as it says, not when a refused command begins. Of several processes,
        the first writes.
        """
        if not distributed.is_first():
            return
        write_whole(self.folder / "config.yaml", config.dump(self.run))
        path = self.folder / "results" / "run.json"
        summary: dict[str, Any] = {"kind": "run", "version": 1}
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # a damaged summary is begun again
            pass
        for key, value in entries.items():
            if isinstance(value, list):
                entries_of = {entry.get("name", entry.get("stage")): entry for entry in [*summary.get(key, []), *value]}
                value = list(entries_of.values())
            summary[key] = value
        write_whole(path, json.dumps(summary, indent=1))


@dataclasses.dataclass
class Stage:
    """What a verb says of its work on one model."""

    rows: int = 0
    reused: bool = False


def write_whole(path: Path, text: str) -> None:
    """Writes a text file that appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def say(text: str) -> None:
    """A line of progress; of several processes, the first says it."""
    if distributed.is_first():
        print(text, file=sys.stderr, flush=True)


def _held(stream: StreamedBlocks, purpose: int) -> Blocks:
    """All blocks of a stream, with documents numbered as ``Blocks`` has them."""
    first = purpose * len(stream)
    parts = [stream.take(slice(at, at + 1)) for at in range(first, first + len(stream))]
    tokens, numbers = (np.concatenate([getattr(part, field) for part in parts]) for field in ("tokens", "documents"))
    known, places = np.unique(numbers, return_inverse=True)
    local = places.reshape(numbers.shape).astype(np.int32) - np.int32((known < 0).any())
    return Blocks(tokens, local, tuple(f"document {number}" for number in known if number >= 0), parts[0].side)


def _stamp(inputs: Any) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def _labels(models: tuple[str, ...]) -> dict[str, str]:
    """A folder name for each model: the last part of its id or path."""
    labels = {name: Path(name.rstrip("/")).name for name in models}
    if len(set(labels.values())) < len(labels):
        raise UserError(f"models: {', '.join(models)} would share a folder in the run; use runs of their own, or rename a folder")
    return labels
