"""The corpus that every Python installation carries: standard library sources and the ``pydoc`` topics.

It exists so that the main job needs no download. Only the standard library of Python is imported here.
"""

import hashlib
import importlib
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Mapping
from pathlib import Path

from ..errors import UserError
from .documents import Document, Side, bucket_side

# Tests repeat the modules they test; encodings and the named files are generated tables; lib2to3 repeats tokenize.py;
# pydoc_data/topics.py is read as topics, not as a module.
_SKIPPED_FOLDERS = frozenset(
    "site-packages dist-packages __pycache__ test tests idle_test encodings lib-dynload lib2to3 pydoc_data _bundled".split()
)
_SKIPPED_FILES = frozenset({"html/entities.py", "stringprep.py"})
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars")

# Topics that contain other topics word for word, or are contained in one.
_SKIPPED_TOPICS = frozenset("compound specialnames execmodel else typesseq-mutable in augassign id-classes dynamic-features".split())

# Packages that share text are hashed under one name, so that near-duplicates stay on one side and a module that is
# renamed between Python versions (datetime -> _pydatetime in 3.12) does not change sides.
_FAMILY = {
    "lzma": "bz2", "gzip": "bz2", "cProfile": "profile", "sre_compile": "re", "sre_constants": "re", "sre_parse": "re",
    "chunk": "wave", "aifc": "wave", "sunau": "wave", "sndhdr": "imghdr", "topic:debugger": "pdb", "ntpath": "posixpath",
    "asynchat": "asyncore", "xmlrpc": "xml", "turtledemo": "turtle", "distutils": "sysconfig", "topic:break": "topic:continue",
    "topic:while": "topic:for",
}  # fmt: skip

# Chosen among salts for shares near 80 / 10 / 10 in bytes on 3.11 and 3.12 and no package
# above a quarter of a side; another salt would move documents that the shipped pocket models were trained on to test.
_SALT = "builtin-5779"


def family_of(name: str) -> str:
    """The name that is hashed to find a document's side: its top-level package or its topic, near-duplicates merged."""
    if not name.startswith("topic:"):
        name = name.split("/")[0].removesuffix(".py")
        bare = name.lstrip("_")
        # _pydecimal, _pyio, _py_abc are the Python halves of decimal, io, abc.
        name = (bare[2:].lstrip("_") if name.startswith("_py") else bare) or name
    return _FAMILY.get(name, name)


def side_of(name: str) -> Side:
    """Side of a built-in document by its name alone (80 / 10 / 10), the same on every Python version."""
    digest = hashlib.sha256(f"{_SALT}:{family_of(name)}".encode()).digest()
    return bucket_side(int.from_bytes(digest[:8], "big") % 100)


def builtin_documents() -> list[Document]:
    """All built-in documents, sorted by name: one per standard library module (``asyncio/queues.py``) and per topic (``topic:assert``).

    Raises ``UserError`` where this Python carries no sources (a zipped or stripped installation).
    """
    root = Path(sysconfig.get_path("stdlib"))
    texts: dict[str, str] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(f for f in folders if f not in _SKIPPED_FOLDERS and not f.startswith("config-"))
        for file in sorted(files):
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if file.endswith(".py") and name not in _SKIPPED_FILES and not file.startswith(_SKIPPED_PREFIXES):
                text = _read_source(path)
                if text and text.strip():
                    texts[name] = text
    if not texts:
        raise UserError(f"no standard library sources under {root}: the built-in corpus needs a Python installation with .py files")
    try:
        topics: Mapping[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions ship the topics in a separate package
        topics = {}
    for name, text in topics.items():
        if name not in _SKIPPED_TOPICS and text.strip():
            texts[f"topic:{name}"] = text.strip() + "\n"
    return [Document(name, texts[name], side_of(name)) for name in sorted(texts)]


def manifest(documents: Iterable[Document]) -> dict[str, str]:
    """Document name -> first 16 hex digits of the SHA-256 of its text (UTF-8, ``\\n`` line ends)."""
    return {d.name: hashlib.sha256(d.text.encode("utf-8", "surrogatepass")).hexdigest()[:16] for d in documents}


def count_matches(wanted: Mapping[str, str], documents: Iterable[Document] | None = None) -> tuple[int, int]:
    """``(n, m)``: n of the m entries of a manifest are present with the same text in ``documents`` (default: this installation's)."""
    have = manifest(builtin_documents() if documents is None else documents)
    return sum(have.get(name) == digest for name, digest in wanted.items()), len(wanted)


def _read_source(path: Path) -> str | None:
    try:
        with tokenize.open(path) as file:  # honours the file's own coding line, reads all line ends as \n
            return file.read()
    except (SyntaxError, UnicodeDecodeError, OSError):
        return None
