"""The launch scripts as far as they can be tried without a cluster, and the commands that the README shows."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from dlmscope_jax import cli, config
from dlmscope_jax.recipes.configs import Run

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("launch_slurm", "launch_tpu_pod")


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / f"{name}.sh"), *arguments], capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", **environment},
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_the_script_is_sound_and_says_how_it_is_used(name):
    path = ROOT / "scripts" / f"{name}.sh"
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0 and path.stat().st_mode & 0o111
    helped = script(name, "--help")
    assert helped.returncode == 0 and helped.stdout.startswith("usage: ") and "--dry-run" in helped.stdout
    verbs = re.findall(rf"scripts/{name}.sh .*?(harvest|train) (configs/\S+)", helped.stdout)
    assert verbs and all((ROOT / file).is_file() for _, file in verbs)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("launch_slurm", [], "which verb"),
        ("launch_slurm", ["--nodes", "many", "train", "x.yaml"], "many is no number"),
        ("launch_slurm", ["--gpu", "8", "train", "x.yaml"], "--gpu is no option"),
        ("launch_tpu_pod", ["--zone", "z", "train", "x.yaml"], "--tpu is missing"),
        ("launch_tpu_pod", ["--tpu", "t", "--zone", "z", "train"], "which verb"),
        ("launch_tpu_pod", ["--tpu", "t", "--zone", "z", "--again", "no", "train", "x.yaml"], "no is no number"),
    ],
)
def test_a_mistake_is_one_line(name, arguments, words):
    done = script(name, *arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


def test_the_slurm_job(tmp_path):
    options = ["--nodes", "2", "--gpus", "4", "--partition", "short", "--account", "lab"]
    given = [*options, "train", "my config.yaml", "--dictionary.k=[1, 2]"]
    shown = script("launch_slurm", "--dry-run", *given)
    assert shown.returncode == 0, shown.stderr
    for line in (
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--requeue",
        "--signal=TERM@300",
        "--partition=short",
        "--account=lab",
    ):
        assert f"#SBATCH {line}\n" in shown.stdout
    assert shown.stdout.index("#SBATCH --account") < shown.stdout.index("cd ")
    # the job itself, with stand-ins for what SLURM brings: it asks to be queued again after 75 and after nothing else
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool, text in {
        "sbatch": f"cat > {tmp_path}/job",
        "srun": f'printf "%s\\n" "$@" > {tmp_path}/ran; exit $STATUS',
        "scontrol": f'echo "$@" >> {tmp_path}/asked',
    }.items():
        (tools / tool).write_text(f"#!/bin/sh\n{text}\n")
        (tools / tool).chmod(0o755)
    path = f"{tools}:/usr/bin:/bin"
    assert script("launch_slurm", *given, PATH=path).returncode == 0
    assert (tmp_path / "job").read_text() == shown.stdout
    for status in (0, 2, 75):
        done = subprocess.run(["bash", str(tmp_path / "job")], env={"PATH": path, "STATUS": str(status), "SLURM_JOB_ID": "77"})
        assert done.returncode == status
    assert (tmp_path / "asked").read_text() == "requeue 77\n"
    assert (tmp_path / "ran").read_text().splitlines()[1:] == [".venv/bin/dlmscope", "train", "my config.yaml", "--dictionary.k=[1, 2]"]


def test_the_command_for_a_pod(tmp_path):
    options = ["--tpu", "pod", "--zone", "there", "--project", "mine"]
    shown = script("launch_tpu_pod", *options, "--dry-run", "harvest", "my config.yaml", "--root=/mnt/runs")
    words = shlex.split(shown.stdout)
    assert words[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"] and words[-2:] == ["--project", "mine"]
    assert words[words.index("--worker") + 1] == "all"
    remote = words[words.index("--command") + 1]
    assert shlex.split(remote) == ["cd", "dlmscope_jax", "&&", ".venv/bin/dlmscope", "harvest", "my config.yaml", "--root=/mnt/runs"]
    # started again after a preemption, as often as was said, and not after a mistake
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool, text in {"gcloud": f"echo x >> {tmp_path}/starts; exit $STATUS", "sleep": "exit 0"}.items():
        (tools / tool).write_text(f"#!/bin/sh\n{text}\n")
        (tools / tool).chmod(0o755)
    for status, starts in ((75, 3), (2, 1), (1, 1), (0, 1)):
        (tmp_path / "starts").write_text("")
        done = script("launch_tpu_pod", *options, "--again", "2", "train", "x.yaml", PATH=f"{tools}:/usr/bin:/bin", STATUS=str(status))
        assert done.returncode == status and (tmp_path / "starts").read_text().count("x") == starts, (status, done.stderr)


def commands() -> list[list[str]]:
    """Every ``dlmscope`` and launch command that stands on a line of its own in the README."""
    lines = (line.strip().partition("  #")[0] for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    "))
    return [shlex.split(line) for line in lines if line.startswith(("dlmscope ", "scripts/launch_"))]


def test_the_commands_of_the_readme_are_ones_that_there_are():
    found = commands()
    assert len(found) >= 10 and {words[1] for words in found if words[0] == "dlmscope"} >= {
        "plan",
        "profile",
        "cache",
        "train",
        "quickstart",
    }
    for words in found:
        if words[0] != "dlmscope":
            done = script(Path(words[0]).stem, "--dry-run", *words[1:])
            assert done.returncode == 0, (words, done.stderr)
            verb = next(i for i, word in enumerate(words) if word in cli.VERBS)
            words = ["dlmscope", *words[verb:]]
        verb, rest = words[1], [word for word in words[2:] if word not in cli._ACTIONS]
        assert verb in cli.VERBS
        files = [word for word in rest if not word.startswith("--")]
        config.load(Run, ROOT / files[0], [word for word in rest if word.startswith("--")])
