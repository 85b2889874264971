"""From a run folder to one HTML file."""

import os
import tempfile
from pathlib import Path

from dlmscope_jax.errors import UserError

from .entropy import entropy
from .features import features
from .fidelity import fidelity
from .generation import generation
from .insertion import insertion
from .markup import join
from .overview import overview
from .page import page
from .pareto import pareto
from .recovery import recovery
from .run import Run, read_run
from .training import training

SECTIONS = (overview, training, recovery, entropy, pareto, fidelity, insertion, features, generation)
_OF_MODELS = (insertion, features, generation)


def report(run_dir: str | Path) -> Path:
    """Writes ``report.html`` into a run folder: one file that opens from disk and asks nothing of the network.

    Args:
      run_dir: a run's folder; what it may hold is described in ``run.py``. Parts that were not measured are left out with a line
        that says so; comparisons of architectures and synthetic worlds are only there in runs that have such.

    Returns:
      The path of the file. It appears whole or not at all.

    Raises:
      UserError: the folder does not exist, holds no results or a damaged one, or cannot be written to.
    """
    run = read_run(run_dir)
    target = run.path / "report.html"
    _write_whole(target, render(run))
    return target


def render(run: Run) -> str:
    """The document of a run; the same run gives the same bytes."""
    models = join((model.name for model in run.models), ", ")
    subtitle = join([models, f" · {len(run.dictionaries)} dictionaries" if run.dictionaries else ""])
    made = [section(run) for section in SECTIONS if not (run.synthetic and section in _OF_MODELS)]
    return page(run.name, subtitle, [section for section in made if section is not None])


def _write_whole(target: Path, document: str) -> None:
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="\n", dir=target.parent, prefix=".report-", delete=False) as file:
            temporary = Path(file.name)
            file.write(document)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise UserError(f"report: {target} cannot be written: {error.strerror}") from None
