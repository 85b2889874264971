"""The built-in corpus: what is in it, and that its sides leak nothing, on this Python and across versions."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from dlmscope_jax.data import corpus
from dlmscope_jax.data.corpus import builtin_documents, count_matches, family_of, manifest, side_of
from dlmscope_jax.data.documents import SIDES, Document
from dlmscope_jax.data.duplicates import gram_pool, overlap
from dlmscope_jax.errors import UserError

PACKAGE = Path(corpus.__file__).parents[1]

# Loads corpus.py without the package's dependencies, which another Python on this machine need not have.
DUMP = """
import json, sys, types
for name, path in (("dlmscope_jax", sys.argv[1]), ("dlmscope_jax.data", sys.argv[1] + "/data")):
    module = types.ModuleType(name); module.__path__ = [path]; sys.modules[name] = module
from dlmscope_jax.data.corpus import builtin_documents
with open(sys.argv[2], "w") as file:
    json.dump([[d.name, d.text, d.side] for d in builtin_documents()], file)
"""


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return builtin_documents()


@pytest.fixture(scope="module")
def train_pool(documents) -> np.ndarray:
    return gram_pool(texts(documents, "train"))


@pytest.fixture(scope="module")
def other_python(tmp_path_factory) -> list[Document]:
    """The documents of the other supported Python version."""
    version = "3.12" if sys.version_info[:2] == (3, 11) else "3.11"
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    file = tmp_path_factory.mktemp("other") / "documents.json"
    for python in [*sorted(map(str, pyenv.glob(f"{version}*/bin/python"))), f"python{version}"]:
        try:
            subprocess.run([python, "-I", "-B", "-c", DUMP, str(PACKAGE), str(file)], check=True, capture_output=True, timeout=120)
        except (OSError, subprocess.CalledProcessError):
            continue
        return [Document(*row) for row in json.loads(file.read_text())]
    pytest.skip(f"needs a Python {version} beside this one")


def texts(documents: list[Document], side: str) -> list[str]:
    return [d.text for d in documents if d.side == side]


def test_documents_are_the_standard_library_and_topics(documents):
    names = [d.name for d in documents]
    assert names == sorted(set(names)) and len(names) > 400
    assert {"argparse.py", "asyncio/queues.py", "topic:assert"} <= set(names)
    unwanted = (
        "test/",
        "encodings/",
        "lib2to3/",
        "idlelib/idle_test/",
        "site-packages/",
        "pydoc_data/",
        "_sysconfigdata",
        "html/entities.py",
    )
    assert not [n for n in names if n.startswith(unwanted) or "/test/" in n or "/tests/" in n]
    queues = next(d for d in documents if d.name == "asyncio/queues.py")
    assert queues.text == Path(sysconfig.get_path("stdlib"), "asyncio", "queues.py").read_text("utf-8")
    assert all(d.text.strip() for d in documents)


def test_sides_are_about_80_10_10(documents):
    total = sum(len(d.text) for d in documents)
    shares = {side: sum(map(len, texts(documents, side))) / total for side in SIDES}
    assert 0.7 < shares["train"] < 0.9 and 0.06 < shares["dev"] < 0.15 and 0.06 < shares["test"] < 0.15, shares
    # fewer than 30 documents would mean no interval (METHODS.md)
    assert min(len(texts(documents, side)) for side in SIDES) >= 30


def test_one_package_one_side():
    assert side_of("asyncio/queues.py") == side_of("asyncio/base_events.py") == side_of("asyncio/__init__.py")
    assert family_of("_pydatetime.py") == family_of("datetime.py") == "datetime"  # renamed in 3.12
    assert family_of("_pydecimal.py") == family_of("decimal.py")
    assert family_of("_py_abc.py") == family_of("abc.py")
    assert {side_of(f"topic:{i}") for i in range(100)} == set(SIDES)


def test_little_of_test_and_dev_is_in_train(documents, train_pool):
    assert overlap(texts(documents, "test"), train_pool) < 0.10
    assert overlap(texts(documents, "dev"), train_pool) < 0.10
    # the measure itself: a module that is on the train side is found there
    assert overlap(texts(documents, "train")[:3], train_pool) == 1.0


def test_sides_agree_between_python_versions(documents, train_pool, other_python):
    mine, theirs = ({d.name: d.side for d in c} for c in (documents, other_python))
    common = mine.keys() & theirs.keys()
    assert len(common) > 400
    assert [n for n in common if mine[n] != theirs[n]] == []
    # and no text has moved between files in a way that would leak
    assert overlap(texts(other_python, "test"), train_pool) < 0.10


def test_manifest_counts_what_this_installation_shares(documents):
    wanted = manifest(documents)
    assert len(wanted) == len(documents) and all(len(v) == 16 for v in wanted.values())
    assert count_matches(wanted, documents) == (len(documents), len(documents))
    first, second = sorted(wanted)[:2]
    changed = {**wanted, first: "0" * 16, "no_such_module.py": wanted[second]}
    assert count_matches(changed, documents) == (len(documents) - 1, len(documents) + 1)
    assert manifest([Document("a", "x", "train")]) == {"a": "2d711642b726b044"}  # sha256 of "x"


def test_an_installation_without_sources_is_said_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match="no standard library sources under"):
        builtin_documents()
