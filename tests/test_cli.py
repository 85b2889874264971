"""The command line as a person meets it: one line for a mistake, exit code 2, the traceback only when asked for."""

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from dlmscope_jax import cli, config
from dlmscope_jax.errors import UserError
from dlmscope_jax.recipes.configs import Run

ROOT = Path(__file__).resolve().parent.parent


def put_verb(monkeypatch, function):
    """Lets ``doctor`` stand for a verb that does what a test needs."""
    from dlmscope_jax.recipes import doctor

    monkeypatch.setattr(doctor, "doctor", function)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quikstart"], ["'quikstart'", "quickstart"]),
        (["train", "nowhere.yaml"], ["nowhere.yaml"]),
        (["train", "--train.stepps=3"], ["train.stepps", "'steps'"]),
        (["train", "--train.steps=many"], ["train.steps", "'many'", "whole number"]),
        (["train", "--dictionary.k=[4096]"], ["k", "4096", "2048"]),
        (["train", "--dtype=float16"], ["dtype", "'float16'", "'bfloat16'"]),
        (["train", "--seed"], ["seed"]),
        (["harvest", "--harvest.low=2"], ["low"]),
        (["harvest", "--models=[]"], ["models"]),
        (["harvest", "--name=a/b"], ["name"]),
        (["harvest", "a.yaml", "b.yaml"], ["a.yaml", "b.yaml", "one config"]),
        (["evaluate", "--evaluate.rates=[0]"], ["rates"]),
        (["report", "--report.latents=-1"], ["report.latents"]),
        (["train", "--mesh.model=0"], ["mesh.model", "above 0"]),
        (["train", "--mesh.parallel=pmap", "--mesh.model=2"], ["mesh.parallel", "pmap", "shard_map"]),
        (["train", "--train.micro-batches=3"], ["train.micro_batches", "2048"]),
        (["train", "--train.source=stream"], ["train.source", "'model'"]),
        (["train", "--cluster.coordinator=host:1"], ["cluster.processes"]),
        (["train", "--cluster.coordinator=host:1", "--cluster.processes=2"], ["cluster.process", "which one"]),
        (["train", "--cluster.coordinator=host:1", "--cluster.processes=2", "--cluster.process=2"], ["cluster.process", "below"]),
        (["harvest", "--data.path=hf://datasets/a/b"], ["data.stream", "true"]),
        (["harvest", "--data.stream=true"], ["data.stream", "builtin"]),
        (["harvest", "--harvest.dtype=int4"], ["harvest.dtype", "'int8'"]),
        (["cache"], ["info, verify, repair"]),
        (["cache", "mend", "x"], ["'mend'", "repair"]),
        (["cache", "info", "runs/x/harvest", "--seed=1"], ["--seed=1", "no options"]),
        (["plan", "a.yaml", "b.yaml"], ["one config"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(arguments, words, capsys):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("dlmscope: ")
    for word in words:
        assert word in captured.err


def test_debug_shows_the_traceback():
    command = [sys.executable, "-m", "dlmscope_jax.cli", "train", "nowhere.yaml"]
    plain = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert plain.returncode == 2 and "Traceback" not in plain.stderr and plain.stderr.count("\n") == 1
    debug = subprocess.run([*command, "--debug"], capture_output=True, text=True, cwd=ROOT)
    assert debug.returncode != 0 and "Traceback" in debug.stderr and "UserError" in debug.stderr


def test_a_verb_gets_the_config_with_its_overrides(monkeypatch, tmp_path):
    got = []
    put_verb(monkeypatch, got.append)
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ntrain: {steps: 7}\n")
    assert cli.main(["doctor", str(path), "--train.lr=3e-4", "--harvest.sites", "[mlp_out@1]", "--harvest.batch-size=2"]) == 0
    (run,) = got
    assert run.name == "mine" and run.train.steps == 7 and run.train.lr == 3e-4
    assert run.harvest.sites == ("mlp_out@1",) and run.harvest.batch_size == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line(monkeypatch, capsys, number):
    def fail(run):
        raise OSError(number, "No space left on device", "runs/x/file")

    put_verb(monkeypatch, fail)
    assert cli.main(["doctor"]) == 2
    error = capsys.readouterr().err
    assert "disk is full" in error and "runs/x/file" in error and error.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_one_line(monkeypatch, capsys):
    def fail(run):
        raise PermissionError(errno.EACCES, "Permission denied", "/forbidden")

    put_verb(monkeypatch, fail)
    assert cli.main(["doctor"]) == 2
    assert "/forbidden" in capsys.readouterr().err


def test_a_defect_of_the_program_is_not_dressed_up_as_the_users(monkeypatch):
    def fail(run):
        raise KeyError("inner")

    put_verb(monkeypatch, fail)
    with pytest.raises(KeyError):
        cli.main(["doctor"])


def test_an_error_of_many_lines_becomes_one(monkeypatch, capsys):
    def fail(run):
        raise UserError("first\n  second")

    put_verb(monkeypatch, fail)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "dlmscope: first second\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_verb(arguments, capsys):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    for verb in cli.VERBS:
        assert verb in out


def test_help_of_a_verb_shows_the_fields_with_the_values_of_the_config(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("train: {steps: 1234}\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", str(path), "--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "1234" in out and "--train.lr" in out and "--dictionary.k" in out


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("dlmscope_jax 0.")


def test_doctor_reports_what_is_there(capsys):
    assert cli.main(["doctor", "--root=/nowhere/at/all"]) == 0
    out = capsys.readouterr().out
    import jax

    for words in ("jax               " + jax.__version__, "cpu", "GiB free at /", "corpus", "pocket-dlm"):
        assert words in out


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_config_is_valid_and_survives_a_round_trip(path, tmp_path):
    run = config.load(Run, path)
    assert run.name == path.stem
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(run))
    assert config.load(Run, again) == run


def test_the_defaults_are_the_quickstarts():
    assert config.load(Run, ROOT / "configs" / "quickstart.yaml") == Run()


def test_the_studies_have_the_papers_layers_and_ks():
    seven, eight = [1, 5, 10, 14, 23, 27], [1, 6, 11, 16, 26, 30]
    layers = {"dream": seven, "qwen": seven, "llada": eight, "llama": eight}
    for name, wanted in layers.items():
        for file in (name, f"paper_{name}"):
            run = config.load(Run, ROOT / "configs" / f"{file}.yaml")
            assert run.harvest.sites == tuple(f"resid_post@{layer}" for layer in wanted)
            assert run.dictionary.k == (50, 80, 160, 320, 520, 820) and run.dictionary.width == 16384
        paper = config.load(Run, ROOT / "configs" / f"paper_{name}.yaml")
        assert (paper.train.steps, paper.train.batch_size, paper.train.lr) == (244140 if name == "llama" else 73242, 2048, 3e-4)
        if name in ("dream", "llada"):
            assert (paper.harvest.policy, paper.harvest.low, paper.harvest.high) == ("batch_rate", 0.05, 0.5)


def test_more_mistakes_are_one_line_and_leave_no_trace(tmp_path, capsys):
    """Found by review: each of these once ended in a traceback or in a changed folder."""
    (tmp_path / "file").write_text("")
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    before = sorted(tmp_path.rglob("*"))
    for arguments, word in [
        (["harvest", "--seed=-1"], "seed"),
        (["harvest", "--evaluate.rates=[1.0]"], "evaluate.rates"),
        (["harvest", "--dictionary.k=[8, 8]"], "dictionary.k"),
        (["harvest", "--name", "--seed=3"], "--name has no value"),
        (["harvest", str(tmp_path / "latin.yaml")], "not UTF-8"),
        (["report", f"--root={tmp_path}", "--name=typo"], "typo"),
        (["harvest", f"--root={tmp_path / 'file'}"], "file"),
    ]:
        assert cli.main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert word in error.splitlines()[-1] and "Traceback" not in error and error.splitlines()[-1].startswith("dlmscope: "), error
    assert sorted(tmp_path.rglob("*")) == before


def test_only_a_process_of_its_own_keeps_what_is_freed(monkeypatch, capsys):
    """What the C library is told holds for a whole process, which is a caller's where arguments are given."""
    told = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: told.append(True))
    assert cli.main(["--version"]) == 0 and not told
    monkeypatch.setattr(sys, "argv", ["dlmscope", "--version"])
    assert cli.main() == 0 and told == [True]
    assert capsys.readouterr().out.count("dlmscope_jax ") == 2
