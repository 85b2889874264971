"""scripts/bench_kernels.py runs, writes what it printed, and refuses names that it does not know."""

import json
import sys

import bench_kernels
import pytest


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench_kernels", *map(str, arguments)])
    bench_kernels.main()


def test_a_quick_run(monkeypatch, capsys, tmp_path):
    wanted = ("--primitives", "topk", "row_update", "--implementations", "reference", "grouped", "lax.top_k")
    run(monkeypatch, "--quick", *wanted, "--json", tmp_path / "record.json")
    record = json.loads((tmp_path / "record.json").read_text())
    (rows,), (update,) = record["results"]["topk"], record["results"]["row_update"]
    assert [side["name"] for side in rows["implementations"]] == ["reference", "grouped", "lax.top_k *"]
    assert [side["name"] for side in update["implementations"]] == ["reference"]
    assert rows["bytes"] == 4 * 16 * 256 + 8 * 16 * 4 and rows["bandwidth"] > 0
    for side in rows["implementations"]:
        assert side["of_bandwidth"] == pytest.approx(rows["bytes"] / side["seconds"] / rows["bandwidth"])
    assert any(reason.startswith("pallas_tpu ") for reason in rows["refused"])
    assert record["device"] and record["versions"]["jax"]
    printed = capsys.readouterr().out
    assert "B N s + B k (s + 4)" in printed and "left out: pallas_tpu" in printed


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["--primitives", "topq"], "--primitives 'topq' is not known: one of combine, "),
        (["--implementations", "fast"], "--implementations 'fast' is not known"),
        (["--dtype", "int8"], "--dtype 'int8' is not known: one of bfloat16, float32"),
        (["--shapes", "3,4"], "--shapes: '3,4' should be rows,width,latents,k"),
        (["--rounds", "0"], "--rounds must be at least 1"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, says):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *arguments)
    printed = capsys.readouterr().err
    assert exit.value.code == 2 and says in printed and printed.count("\n") == 1
