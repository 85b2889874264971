"""The repository's own rules: style, types, floors, what importing costs, and what a wheel holds."""

import ast
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "dlmscope_jax"
# what takes long to import, or starts a backend
HEAVY = ("jax", "flax", "optax", "orbax", "tensorstore", "transformers", "tokenizers", "torch", "pyarrow", "numpy", "rich", "tyro")


def run(*command: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command, cwd=options.pop("cwd", ROOT), capture_output=True, text=True, **options)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_ruff():
    done = run(sys.executable, "-m", "ruff", "check", "--no-cache", "dlmscope_jax", "tests", "scripts")
    assert done.returncode == 0, done.stdout + done.stderr


def test_types():
    done = run(sys.executable, "-m", "mypy", "--no-error-summary")
    assert done.returncode == 0, done.stdout + done.stderr


def test_floors():
    done = run(str(Path(sys.executable).with_name("lint-imports")), "--no-cache")
    assert done.returncode == 0, done.stdout + done.stderr


def imported_names(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_no_forbidden_imports():
    for path in sources():
        names = imported_names(path)
        for forbidden in ("jax._src", "flax.nnx", "pickle", "jax.experimental.shard_map", "jax.experimental.pjit"):
            if forbidden == "pickle" and path.name == "torch_pickle.py":
                continue  # the restricted reader of .pt files, which executes nothing
            assert not {n for n in names if n == forbidden or n.startswith(forbidden + ".")}, f"{path} imports {forbidden}"
        assert "nnx." not in path.read_text(encoding="utf-8"), path


def test_annotations_stay_objects_where_dataclasses_are():
    """jaxtyping and the strict config read annotations at run time."""
    for path in sources():
        text = path.read_text(encoding="utf-8")
        assert "dataclass" not in text or "from __future__ import annotations" not in text, path


def modules_after(statement: str) -> set[str]:
    done = run(sys.executable, "-c", f"{statement}\nimport sys\nprint('\\n'.join(sys.modules))")
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.split()}


@pytest.mark.parametrize(
    "statement",
    [
        "import dlmscope_jax",
        "import dlmscope_jax.recipes.configs",
        "from dlmscope_jax.cli import main; main(['--help'])",
    ],
)
def test_nothing_heavy_is_imported(statement):
    assert not modules_after(statement) & set(HEAVY)


@pytest.mark.parametrize("verb", ["quickstart", "harvest", "train", "evaluate", "report", "doctor"])
def test_the_help_of_a_verb_needs_no_jax(verb):
    statement = f"from dlmscope_jax.cli import main\ntry: main([{verb!r}, 'configs/quickstart.yaml', '--help'])\nexcept SystemExit: pass"
    assert not modules_after(statement) & (set(HEAVY) - {"tyro", "rich"})


def test_every_public_name_is_there():
    import dlmscope_jax

    for name in dlmscope_jax.__all__:
        assert getattr(dlmscope_jax, name) is not None, name
    assert set(dlmscope_jax.__all__) <= set(dir(dlmscope_jax))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dlmscope_jax.no_such_name


def test_the_report_is_callable_whichever_way_it_was_imported_first():
    """``ds.report(...)`` is a function, although ``dlmscope_jax.report`` is a room as well."""
    room_first = "import dlmscope_jax.report.run as r, dlmscope_jax as ds; assert r.read_run is ds.report.read_run"
    function_first = "import dlmscope_jax as ds; ds.report; import dlmscope_jax.report; from dlmscope_jax.report import read_run"
    for first in (room_first, function_first):
        call = "\ntry: ds.report('nowhere')\nexcept ds.UserError as e: print(e)"
        done = run(sys.executable, "-c", first + call)
        assert done.returncode == 0 and "nowhere" in done.stdout, done.stderr


def test_a_wheel_holds_the_pocket_models_and_the_type_marker(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(PACKAGE, source / "dlmscope_jax", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    done = run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source))
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = {str(p.relative_to(ROOT)) for p in (PACKAGE / "pocket").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    wanted |= {str(p.relative_to(ROOT)) for p in sources()} | {"dlmscope_jax/py.typed"}
    assert wanted <= names, sorted(wanted - names)
    for model in ("pocket-dlm", "pocket-dream", "pocket-ar"):
        assert f"dlmscope_jax/pocket/{model}/model.safetensors" in names
        assert f"dlmscope_jax/pocket/{model}/tokenizer.json" in names
    assert not [n for n in names if n.startswith(("tests/", "scripts/", "configs/"))]
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith(".dist-info/METADATA"))).decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Dist: jax<0.12,>=0.10.2" in metadata


def python_blocks(path: Path) -> list[str]:
    blocks = path.read_text(encoding="utf-8").split("```python\n")[1:]
    return [block.split("```")[0] for block in blocks]


def test_the_readme_has_both_examples_at_about_ten_lines():
    blocks = python_blocks(ROOT / "README.md")
    assert len(blocks) == 2
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip()]) <= 12


@pytest.mark.parametrize("which", [0, 1])
def test_readme_examples_run(which, tmp_path):
    block = python_blocks(ROOT / "README.md")[which]
    done = run(sys.executable, "-W", "error::UserWarning", "-c", block, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip(), "an example shows something"


@pytest.mark.parametrize("name", ["quickstart", "test"])
def test_scripts_say_in_one_line_what_is_missing(name, tmp_path):
    """A copy of the scripts, no Python in reach, called through a link from another folder."""
    (tmp_path / "repo" / "scripts").mkdir(parents=True)
    for file in ("quickstart", "test", "environment.sh"):
        shutil.copy(ROOT / "scripts" / file, tmp_path / "repo" / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "readlink", "dirname", "df", "awk", "head", "rm", "cat"):
        (tools / tool).symlink_to(shutil.which(tool))
    old = tools / "python3"
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.8.1; exit 0; fi\nexit 1\n')
    old.chmod(0o755)
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "repo" / "scripts" / name)
    environment = {"PATH": str(tools), "HOME": str(tmp_path)}
    done = run("/bin/bash", str(link), cwd=tmp_path, env=environment)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1 and "3.11 or 3.12" in done.stderr and "3.8.1" in done.stderr
    done = run("/bin/bash", str(link), "--python", "3.9", cwd=tmp_path, env=environment)
    assert done.returncode != 0 and "3.9" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "repo" / ".venv").exists()


def test_the_scripts_say_when_the_disk_is_full(tmp_path):
    (tmp_path / "repo" / "scripts").mkdir(parents=True)
    for file in ("quickstart", "environment.sh"):
        shutil.copy(ROOT / "scripts" / file, tmp_path / "repo" / "scripts")
    tools = tmp_path / "bin"
    tools.mkdir()
    full = tools / "df"
    full.write_text("#!/bin/sh\necho Filesystem 1M-blocks Used Available\necho /dev/full 100 95 5\n")
    full.chmod(0o755)
    python = Path(sys.executable).resolve()
    (tools / "python3").symlink_to(python)
    done = run("/bin/bash", str(tmp_path / "repo/scripts/quickstart"), env={"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(tmp_path)})
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1 and "2000 MB" in done.stderr and "5 MB" in done.stderr
    assert not (tmp_path / "repo" / ".venv").exists()


def test_ci_runs_the_tests_and_nothing_else():
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) == 1 and "scripts/test" in lines[0]


def test_the_no_torch_option_says_what_it_left_out(tmp_path):
    """The suite's own options, on a copy of its set-up with two small files."""
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / "test_one.py").write_text("import torch\ndef test_a(): pass\n")
    (tmp_path / "tests" / "test_two.py").write_text(
        textwrap.dedent("""
        import warnings
        import pytest
        def test_b(): pass
        @pytest.mark.torch
        def test_c(): raise SystemError
        def test_e(): pytest.importorskip("torch"); raise SystemError
        @pytest.mark.slow
        def test_d(): raise SystemError
        @pytest.mark.xfail(strict=True, raises=UserWarning)
        def test_warnings_are_errors(): warnings.warn("x", UserWarning, stacklevel=1)
    """)
    )
    done = run(sys.executable, "-m", "pytest", "--no-torch", "-p", "no:cacheprovider", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--no-torch: left out what compares with torch (3 tests or files)" in done.stdout
    assert "left out 1 slow test" in done.stdout and "1 passed, 3 deselected, 1 xfailed" in done.stdout


@pytest.mark.parametrize("folder", ["dictionaries", "kernels", "models", "analysis"])
def test_strict_dtype_promotion_is_on_where_the_mathematics_is(folder, tmp_path):
    (tmp_path / "tests" / folder).mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "tests")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "tests" / folder / "test_it.py").write_text(
        "import jax.numpy as jnp, pytest\n"
        "def mixed(): return jnp.ones(2, jnp.int32) + jnp.ones(2, jnp.bfloat16)\n"
        "def test_default():\n"
        + ("    mixed()\n" if folder == "analysis" else "    with pytest.raises(Exception, match='promotion'): mixed()\n")
        + "@pytest.mark.standard_promotion\ndef test_marked(): mixed()\n"
    )
    done = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
