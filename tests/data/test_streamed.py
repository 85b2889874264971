"""Streams of text: every document once, in an order that no number of processes changes, from any cursor, and only what is needed."""

import gzip
import hashlib
import json
import types
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dlmscope_jax.data import StreamedBlocks, load_tokenizer, read_documents
from dlmscope_jax.data.documents import bucket_side
from dlmscope_jax.data.streamed import LANES, Cursor, Cursors, HubFiles, LocalFiles
from dlmscope_jax.errors import UserError

LENGTH, WINDOW = 16, 2


@pytest.fixture(scope="module")
def tok():
    return load_tokenizer("pocket-dlm")


def texts(n: int, seed: int = 0) -> list[str]:
    """Texts that are all different, some of several blocks, some empty, some with what JSON escapes."""
    draw = np.random.default_rng(seed)
    some = [" ".join(f"w{draw.integers(10_000)}" for _ in range(draw.integers(1, 30))) + "\n é\u2028" for _ in range(n)]
    return [text if i % 9 else " " for i, text in enumerate(some)]


def write(folder: Path, kind: str, n_files: int = 3, n: int = 60, group: int = 7) -> list[str]:
    folder.mkdir(exist_ok=True)
    every = []
    for i in range(n_files):
        some = texts(n, i)
        every += some
        if kind == "parquet":
            pyarrow.parquet.write_table(pyarrow.table({"id": list(range(n)), "text": some}), folder / f"{i}.parquet", row_group_size=group)
            continue
        lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in some).encode() + b"\n"
        (folder / f"{i}.jsonl").write_bytes(lines) if kind == "jsonl" else (folder / f"{i}.json.gz").write_bytes(gzip.compress(lines))
    (folder / "README.md").write_text("not a table")
    return every


def stream(files, tok, count: int = 4 * LANES * WINDOW, **more) -> StreamedBlocks:
    return StreamedBlocks(files, tok, LENGTH, "train", count, WINDOW, **more)


def windows(blocks: StreamedBlocks, some) -> dict[int, tuple[bytes, bytes]]:
    found = {w: blocks.take(slice(w * WINDOW, (w + 1) * WINDOW)) for w in some}
    return {w: (b.tokens.tobytes(), b.documents.tobytes()) for w, b in found.items()}


def documents_in(blocks: StreamedBlocks, tok) -> list[str]:
    """The documents that all lanes hold, decoded: each lane is read until it has nothing more."""
    whole: dict[int, list[int]] = {}
    for lane in range(LANES):
        for place in range(10_000):
            first = (place * LANES + lane) * WINDOW
            got = blocks.take(slice(first, first + WINDOW))
            assert (got.tokens[:, 0] == tok.bos_id).all() and got.documents.max(initial=-1) < 2**31 - 1
            if (got.documents < 0).all():
                break
            for number, token in zip(got.documents[:, 1:].ravel(), got.tokens[:, 1:].ravel(), strict=True):
                if number >= 0:
                    assert number % LANES == lane
                    whole.setdefault(int(number), []).append(int(token))
    return [tok.decode(ids[:-1]) for ids in whole.values() if ids[-1] == tok.eos_id]


def side(text: str) -> str:
    return bucket_side(int(hashlib.sha256(text.encode()).hexdigest(), 16) % 100)


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "gz"])
@pytest.mark.parametrize("n_files", [1, 3, 70])
def test_every_document_of_the_side_once(kind, n_files, tok, tmp_path):
    every = write(tmp_path / "text", kind, n_files, 60 if n_files < 70 else 4)
    wanted = sorted(text for text in every if text.strip() and side(text) == "train")
    found = documents_in(stream(tmp_path / "text", tok), tok)
    assert sorted(found) == wanted


def test_the_sides_are_those_of_the_other_reader(tok, tmp_path):
    """Where no text is nearly another."""
    write(tmp_path / "text", "jsonl", 2)
    ours = documents_in(stream(tmp_path / "text", tok), tok)
    theirs = [d.text for d in read_documents(tmp_path / "text") if d.side == "train" and not d.name.startswith("README")]
    assert sorted(ours) == sorted(theirs) and theirs


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "gz"])
def test_no_block_depends_on_who_reads_or_where_reading_began(kind, tok, tmp_path):
    write(tmp_path / "text", kind)
    alone = windows(stream(tmp_path / "text", tok, repeat=True), range(4 * LANES))
    for processes in (2, 3):
        for p in range(processes):
            mine = [w for w in range(4 * LANES) if w % LANES % processes == p]
            assert windows(stream(tmp_path / "text", tok, repeat=True), mine).items() <= alone.items()
    # a killed process: the next one begins again in the middle, with the notes of the first and without
    notes = tmp_path / "notes"
    windows(stream(tmp_path / "text", tok, repeat=True, notes=notes), range(3 * LANES - 5))
    rest = range(2 * LANES + 3, 4 * LANES)
    assert windows(stream(tmp_path / "text", tok, repeat=True, notes=notes), rest).items() <= alone.items()
    assert windows(stream(tmp_path / "text", tok, repeat=True), rest).items() <= alone.items()
    # one window alone, as a repair asks for it
    assert windows(stream(tmp_path / "text", tok, repeat=True, notes=notes), [LANES + 7]).items() <= alone.items()


def test_a_repeated_lane_has_no_padding_and_an_ended_one_is_padding(tok, tmp_path):
    write(tmp_path / "text", "jsonl")
    again, once = (stream(tmp_path / "text", tok, 64 * LANES * WINDOW, repeat=repeat) for repeat in (True, False))
    assert not again.padded and once.padded and again.digest != once.digest
    lane = 5
    last = (63 * LANES + lane) * WINDOW
    assert (again.take(slice(last, last + WINDOW)).documents >= 0).all()
    assert (once.take(slice(last, last + WINDOW)).documents == -1).all()


def test_a_lane_without_text_reads_its_neighbours_and_no_text_at_all_is_an_error(tok, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(12)))
    few = stream(tmp_path, tok, repeat=True)
    for lane in range(LANES):
        assert (few.take(slice(lane * WINDOW, lane * WINDOW + WINDOW)).documents >= 0).all()
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(UserError, match="no text of the stream is on the train side"):
        stream(tmp_path, tok, repeat=True).take(slice(0, WINDOW))


def test_damaged_notes_are_read_over(tok, tmp_path):
    write(tmp_path / "text", "parquet")
    alone = windows(stream(tmp_path / "text", tok, repeat=True), range(4 * LANES))
    windows(stream(tmp_path / "text", tok, repeat=True, notes=tmp_path / "notes"), range(3 * LANES))
    for i, path in enumerate(sorted((tmp_path / "notes").rglob("*.jsonl"))):
        whole = bytearray(path.read_bytes())
        if i % 2:
            whole[(i * 37) % len(whole)] ^= 4
        else:
            del whole[-(i % 40 + 1) :]
        path.write_bytes(whole)
    again = stream(tmp_path / "text", tok, repeat=True, notes=tmp_path / "notes")
    assert windows(again, range(4 * LANES)) == alone


def test_a_note_is_whole_after_a_torn_one(tmp_path):
    notes = Cursors(tmp_path)
    notes.note(3, 1, Cursor(0, 1, 2, 3, 4))
    path = tmp_path / "lane-03.jsonl"
    path.write_bytes(path.read_bytes() + b"\n0000")
    Cursors(tmp_path).note(3, 2, Cursor(1, 5, 6, 7, 8))
    assert Cursors(tmp_path).before(3, 9) == (2, Cursor(1, 5, 6, 7, 8))
    assert Cursors(tmp_path).before(3, 1) == (1, Cursor(0, 1, 2, 3, 4))


class Counting(LocalFiles):
    """Counts the bytes that are read."""

    def __init__(self, path):
        super().__init__(path)
        self.read = 0

    def open(self, name):
        file, counter = super().open(name), self

        class Counted(type(file)):
            def read(self, *args):
                data = super().read(*args)
                counter.read += len(data)
                return data

            def readinto(self, into):
                n = super().readinto(into)
                counter.read += n
                return n

            def readline(self, *args):
                data = super().readline(*args)
                counter.read += len(data)
                return data

        return Counted(file.detach())


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_a_little_of_a_large_stream_reads_a_little(kind, tok, tmp_path):
    """One window of one lane: its own part of one file, and a table's list of contents."""
    write(tmp_path / "text", kind, 1, 4000, 50)
    size = sum(f.stat().st_size for f in (tmp_path / "text").glob("0.*"))
    files = Counting(tmp_path / "text")
    stream(files, tok).take(slice(9 * WINDOW, 10 * WINDOW))
    assert 0 < files.read < 0.35 * size, (files.read, size)


class FakeHub:
    """What of ``HfFileSystem`` and ``HfApi`` is used, over a local folder."""

    def __init__(self, folder: Path):
        self.folder, self.opened = folder, []

    def resolve_path(self, path):
        _, owner, name, *rest = path.split("/")
        name, _, revision = name.partition("@")
        return types.SimpleNamespace(repo_id=f"{owner}/{name}", revision=revision or "main", path_in_repo="/".join(rest))

    def dataset_info(self, repo, revision):
        if repo != "owner/name":
            raise RuntimeError("404 Client Error\nno such dataset")
        return types.SimpleNamespace(sha="f" * 40)

    def find(self, root, detail):
        prefix = "datasets/owner/name@" + "f" * 40
        below = self.folder / root.removeprefix(prefix).strip("/")
        names = [below] if below.is_file() else [f for f in below.rglob("*") if f.is_file()]
        return {f"{prefix}/{f.relative_to(self.folder).as_posix()}": {"size": f.stat().st_size} for f in names}

    def open(self, path, mode):
        assert path.startswith("datasets/owner/name@" + "f" * 40) and mode == "rb"
        self.opened.append(path)
        return open(self.folder / path.split("/", 3)[3], mode)


@pytest.mark.parametrize("below", ["", "/data", "/data/1.parquet"])
def test_a_dataset_on_the_hub_is_read_as_one_commit(below, tok, tmp_path):
    (tmp_path / "repo").mkdir()
    write(tmp_path / "repo" / "data", "parquet")
    hub = FakeHub(tmp_path / "repo")
    files = HubFiles(f"hf://datasets/owner/name{below}", hub, hub)
    local = LocalFiles(tmp_path / "repo" / below.lstrip("/"))
    assert windows(stream(files, tok), range(20)) == windows(stream(local, tok), range(20))
    assert hub.opened and files.mark == "f" * 40
    assert stream(files, tok).digest != stream(local, tok).digest


def test_mistakes_are_named(tok, tmp_path):
    hub = FakeHub(tmp_path)
    with pytest.raises(UserError, match=r"hf://datasets/owner/other cannot be had from the hub \(404 Client Error\)"):
        HubFiles("hf://datasets/owner/other", hub, hub)
    with pytest.raises(UserError, match="nowhere does not exist"):
        stream(tmp_path / "nowhere", tok)
    with pytest.raises(UserError, match="holds no .parquet"):
        stream(tmp_path, tok)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"body": 3}\n')
    with pytest.raises(UserError, match=r"a.jsonl, byte 16, has no column 'text' \(its columns are body\)"):
        windows(stream(tmp_path, tok), range(LANES))
    (tmp_path / "a.jsonl").write_bytes(b'{"text": ["one"]}\n')
    with pytest.raises(UserError, match="holds list, not text"):
        windows(stream(tmp_path, tok), range(LANES))
    (tmp_path / "a.jsonl").unlink()
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and nothing more")
    with pytest.raises(UserError, match="a.parquet is not a readable parquet file"):
        windows(stream(tmp_path, tok), range(LANES))
