"""Stores behind URLs that are no files: read over a network, and one line where there is no answer."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice

import numpy as np
import pytest

from dlmscope_jax.activations import ActivationStore, manifest
from dlmscope_jax.activations.checking import examine
from dlmscope_jax.errors import UserError


def make(url):
    store = ActivationStore.create(url, {"h": 3}, {"who": "test"}, "int8", 16, 4)
    store.append({"h": np.random.default_rng(0).standard_normal((50, 3))}, {"number": np.arange(50)})
    return store.finish()


class Bucket(BaseHTTPRequestHandler):
    """Objects by path, whole or in ranges, as object stores serve them."""

    root = None
    refuses = 0

    def do_GET(self):
        path = self.root / self.path.lstrip("/").split("?")[0]
        if self.refuses:
            return self.answer(self.refuses, b"")
        if not path.is_file():
            return self.answer(404, b"")
        raw = path.read_bytes()
        wanted = self.headers.get("Range")
        if wanted is None:
            return self.answer(200, raw)
        first, last = wanted.removeprefix("bytes=").split("-")
        start, stop = (int(first), int(last or len(raw) - 1) + 1) if first else (len(raw) - int(last), len(raw))
        self.answer(206, raw[start:stop], f"bytes {start}-{min(stop, len(raw)) - 1}/{len(raw)}")

    def answer(self, code, raw, part=None):
        self.send_response(code)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("ETag", '"1"')
        if part:
            self.send_header("Content-Range", part)
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A folder and the URL of a server that serves it."""
    handler = type("Handler", (Bucket,), {"root": tmp_path})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield tmp_path, f"http://127.0.0.1:{server.server_port}", handler
    server.shutdown()
    server.server_close()


def test_a_store_is_read_over_a_network(served):
    folder, url, _ = served
    local = make(folder / "s")
    found = ActivationStore.open(f"{url}/s")
    assert found.complete and found.rows == 50 and found.url == f"{url}/s"
    np.testing.assert_array_equal(found.read("h"), local.read("h"))
    for one, other in zip(found.batches(8, 0, epochs=1), local.batches(8, 0, epochs=1), strict=True):
        np.testing.assert_array_equal(one["h"], other["h"])
        np.testing.assert_array_equal(one["number"], other["number"])
    assert found.verify() == () and not examine(f"{url}/s").damaged
    path = folder / "s/sites/h/c/1/0"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match="shard 1 of h in http://"):
        list(ActivationStore.open(f"{url}/s").batches(8, 0, epochs=1))
    with pytest.raises(UserError, match=f"there is no activation store at {url}/none"):
        ActivationStore.open(f"{url}/none")


def test_an_unfinished_store_over_http_shows_the_first_writers_shards(served):
    """Such a store cannot be listed."""
    folder, url, _ = served
    make(folder / "s").forget([1])
    found = ActivationStore.open(f"{url}/s", allow_incomplete=True)
    assert [s.shard for s in found.shards] == [0, 2, 3]
    assert len(list(islice(found.batches(8, 0, epochs=1), 9))) == 34 // 8


def test_a_server_that_says_no_is_one_line(served):
    _, url, handler = served
    handler.refuses = 403
    with pytest.raises(
        UserError, match="cannot read http://.*403.*; check the name of the bucket, the network, and the credentials"
    ) as error:
        ActivationStore.open(f"{url}/s")
    assert "\n" not in str(error.value)


def test_a_server_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(manifest, "ANSWER", 0.3)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begun = time.monotonic()
        for action in (ActivationStore.open, make, examine):
            with pytest.raises(UserError, match=r"http://127.0.0.1:\d+/s did not answer within 0.3 s: check the name of the bucket"):
                action(f"http://127.0.0.1:{silent.getsockname()[1]}/s")
        assert time.monotonic() - begun < 60  # tensorstore alone goes on trying


@pytest.mark.parametrize("url", ["gs://bucket/runs/a", "s3://bucket/runs/a"])
def test_buckets_are_known_to_the_storage_layer(url):
    import tensorstore as ts

    spec = ts.KvStore.Spec(f"{url}/")
    assert spec.to_json()["driver"] == {"gs": "gcs", "s3": "s3"}[url[:2]] and spec.to_json()["bucket"] == "bucket"
    assert spec.path == "runs/a/"


@pytest.mark.parametrize(("url", "message"), [("gs://Bad_/x", "Bad_"), ("s3:///x", "s3:///x"), ("ftp://host/x", "ftp"), ("", "is empty")])
def test_urls_that_cannot_be_are_refused_at_once(url, message):
    with pytest.raises(UserError, match=message) as error:
        ActivationStore.open(url)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
