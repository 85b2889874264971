"""scripts/bench_step.py: medians and ratios of made-up contestants, its table, its mistakes; slow, the script itself at a tiny shape."""

import json
import subprocess
import sys

import bench_step
import pytest

# Answers as a contestant does: a tenth of a second more in every round, the peers slower, and a machine that is busy in round 2.
CONTESTANT = """
import json, sys
name = sys.argv[sys.argv.index("--contestant") + 1]
if name == "broken":
    sys.exit(1)
factor = {"ours": 1, "ours, 10 % dead": 2, "encoder product": 0.5}.get(name, 4)
print("ready", flush=True)
for i, _ in enumerate(sys.stdin):
    busy = 10 if i == 2 else 1
    print(json.dumps({"seconds": factor * (1 + i) * busy, "peak_bytes": factor * 10**9 - i, "dead": 0.25}), flush=True)
"""


@pytest.fixture
def contestants(monkeypatch, tmp_path):
    script = tmp_path / "contestant.py"
    script.write_text(CONTESTANT)
    monkeypatch.setattr(bench_step, "__file__", str(script))


def test_ratios_are_those_of_the_rounds(contestants):
    result = bench_step.compare((16, 8, 64, 4), 3, ["dictionary_learning"], sys.executable)
    assert result["all_seconds"]["ours"] == [1, 2, 30] and result["seconds"]["ours"] == 2
    assert result["ratio"] == {"ours": 1, "ours, 10 % dead": 2, "encoder product": 0.5, "dictionary_learning": 4}
    assert result["over_encoder"] == 2 and result["peak_bytes"]["ours"] == 10**9
    assert result["dead"] == {"ours": 0.25, "ours, 10 % dead": 0.25}
    lines = bench_step.table(result).splitlines()
    assert lines[0] == "B 16, d 8, N 64, k 4: medians of 3 rounds in turn"
    assert next(line for line in lines if "dictionary_learning " in line).split() == ["dictionary_learning", "8.000", "4.00", "4.00"]
    assert lines[-2:] == ["  our step over the encoder product: 2.00", "  peak memory over dictionary_learning's: 0.25"]
    without = {name: value for name, value in result["peak_bytes"].items() if name != "dictionary_learning"}
    assert "peak memory over" not in bench_step.table(result | {"peak_bytes": without, "seconds": dict.fromkeys(without, 1.0)})


def test_one_that_does_not_start_is_named(contestants):
    with pytest.raises(SystemExit, match="bench_step: broken did not start"):
        bench_step.compare((16, 8, 64, 4), 1, ["broken"], sys.executable)


def test_batches_have_rows_of_norm_one_on_average():
    first, second, *_ = bench_step.batches(64, 16)
    assert first.shape == (64, 16) and first.dtype == "float32" and (first != second).any()
    assert (first**2).sum(axis=1).mean() == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    "arguments,says",
    [
        (["--shapes", "3,4"], "--shapes: '3,4' should be rows,width,latents,k such as 2048,768,16384,32"),
        (["--shapes", "16,8,64,65"], "--shapes: '16,8,64,65' should be"),
        (["--shapes", "16,8,0,0"], "--shapes: '16,8,0,0' should be"),
        (["--against", "torch"], "--against 'torch' is not known: one of sparsify, saelens, dictionary_learning"),
        (["--rounds", "0", "--against"], "--rounds must be at least 1"),
    ],
)
def test_mistakes_are_one_line(monkeypatch, capsys, arguments, says):
    monkeypatch.setattr(sys, "argv", ["bench_step", *arguments])
    with pytest.raises(SystemExit) as exit:
        bench_step.main()
    printed = capsys.readouterr().err
    assert exit.value.code == 2 and says in printed and printed.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_script_itself(tmp_path):
    """Ours alone: a step without dead latents, one with a tenth of them dead, which stay so."""
    record = tmp_path / "record.json"
    command = [sys.executable, bench_step.__file__, "--shapes", "16,8,64,4", "--rounds", "2", "--against", "--json", record]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = json.loads(record.read_text())["results"]
    assert result["dead"] == {"ours": 0, "ours, 10 % dead": pytest.approx(6 / 64)}
    assert set(result["ratio"]) == {"ours", "ours, 10 % dead", "encoder product"} and min(result["peak_bytes"].values()) > 10**7
    assert "our step over the encoder product" in done.stdout
