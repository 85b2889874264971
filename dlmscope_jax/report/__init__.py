"""A run folder as one HTML file that opens from disk."""

from .build import render, report
from .run import Run, read_run

__all__ = ["Run", "read_run", "render", "report"]
