"""Files become documents; wrong files become one clear line."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dlmscope_jax.data import Document, assign_sides, on_side, read_documents
from dlmscope_jax.errors import UserError


def prose(seed: int, n: int = 60) -> str:
    return " ".join(f"w{i}" for i in np.random.default_rng([7, seed]).integers(0, 9999, n))


def test_a_folder_of_everything(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "a.txt").write_bytes("\ufeffgrüße\r\nzwei".encode())
    (tmp_path / "deep" / "b.md").write_text("# title")
    (tmp_path / "deep" / "er" / "c.PY").write_text("x = 1")
    (tmp_path / "blank.txt").write_text("  \n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff")
    (tmp_path / ".hidden" / "no.txt").write_text("not read")
    rows = [{"text": "line\u2028separator", "id": 1}, {"text": ""}, {"text": None}, {"text": "third"}]
    (tmp_path / "d.jsonl").write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in rows) + "\n\n", "utf-8")
    pq.write_table(pa.table({"text": ["p0", None, "p2"], "n": [1, 2, 3]}), tmp_path / "e.parquet", row_group_size=2)
    found = {d.name: d.text for d in read_documents(tmp_path)}
    assert found == {
        "a.txt": "grüße\nzwei", "deep/b.md": "# title", "deep/er/c.PY": "x = 1", "d.jsonl:0": "line\u2028separator", "d.jsonl:3": "third",
        "e.parquet:0": "p0", "e.parquet:2": "p2",
    }  # fmt: skip


def test_another_column_can_be_named(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text('{"content": "hello"}')
    assert read_documents(file, text_column="content")[0].text == "hello"
    pq.write_table(pa.table({"content": pa.array(["big"], pa.large_string())}), tmp_path / "x.parquet")
    assert read_documents(tmp_path / "x.parquet", text_column="content")[0].text == "big"


def write(tmp_path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    return tmp_path / name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"a,b", "unknown file type '.csv'"),
        ("Makefile", b"a,b", "unknown file type '(none)'"),
        ("a.txt", b" \n ", "is an empty corpus"),
        ("a.txt", b"caf\xe9", "is not UTF-8 (byte 3)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "line 2, is not JSON"),
        ("a.jsonl", b'{"body": "a", "id": 1}', "has no column 'text' (its columns are body, id)"),
        ("a.jsonl", b"[1]", "has no column 'text' (it holds a list)"),
        ("a.jsonl", b'{"text": 3}', "row 0: column 'text' holds int, not text"),
        ("a.parquet", b"PAR1 nonsense", "is not a readable parquet file"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path, name, content, message):
    file = write(tmp_path, name, content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_documents(file)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_parquet_without_the_column(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text' \(its columns are body, id\)"):
        read_documents(tmp_path)
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="row 0: column 'text' holds int"):
        read_documents(tmp_path)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist: give a file or a folder"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"holds no .txt.*\(it is empty\)"):
        read_documents(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"holds no .txt.*\(found .csv\)"):
        read_documents(tmp_path)


def test_sides_follow_the_content():
    texts = [prose(i) for i in range(400)]
    sides = assign_sides(texts)
    assert abs(sides.count("train") - 320) < 40 and sides.count("dev") > 15 and sides.count("test") > 15
    assert assign_sides(texts[::-1]) == sides[::-1]
    assert assign_sides(texts + [prose(1000)])[:400] == sides


def test_near_duplicates_share_a_side():
    texts = [prose(i) for i in range(200)]
    edited = [t + " " + prose(5000 + i, 30) for i, t in enumerate(texts)]  # 48 of 60 + 30 - 12 = 78 grams are shared
    sides = assign_sides(texts + edited)
    assert sides[:200] == sides[200:]
    assert assign_sides((texts + edited)[::-1]) == sides[::-1]
    assert assign_sides(texts)[:200] != assign_sides(edited)  # alone they would not agree


def test_a_side_without_documents_is_said_so():
    documents = [Document("a", "x", "train"), Document("b", "y", "train")]
    assert on_side(documents, "train") == documents
    with pytest.raises(UserError, match="none of the 2 documents falls on the test side"):
        on_side(documents, "test")
