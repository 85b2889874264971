"""``dlmscope quickstart``: the verbs one after the other, model by model, and a table of what came out."""

from pathlib import Path

from dlmscope_jax.report import report as write_report

from .configs import Run
from .pipeline import evaluate_model, harvest_model, train_model
from .table import headline
from .work import Work


def quickstart(run: Run) -> Path:
    """Text to report: harvest, train, evaluate and report for every model or world of the run; prints the headline numbers.

    What is in the run's folder already is not done again.

    Returns:
      The path of the report.
    """
    work = Work(run)
    for name in work.names:
        harvest_model(work, name)
        if not run.released:
            train_model(work, name)
        evaluate_model(work, name)
    path = write_report(work.folder)
    print(headline(work.folder))
    print(f"\nrun folder: {work.folder.resolve()}\nreport:     {path.resolve()}")
    return path
