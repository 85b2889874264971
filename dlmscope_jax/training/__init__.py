"""Training of dictionaries and of small language models; progress for every long job.

The names load on first use: progress is wanted by commands that must start without jax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoints import Checkpoints, load_latest, save_checkpoint
    from .loop import train
    from .metrics import read_metrics
    from .progress import Progress
    from .run import Trained
    from .schedules import learning_rate
    from .sources import Growing
    from .spec import TrainSpec
    from .state import TrainState, estimate_scale, final_params, init_state, state_shardings
    from .step import make_step

_HOMES = {
    "Checkpoints": "checkpoints",
    "Growing": "sources",
    "Progress": "progress",
    "TrainSpec": "spec",
    "TrainState": "state",
    "Trained": "run",
    "estimate_scale": "state",
    "final_params": "state",
    "init_state": "state",
    "learning_rate": "schedules",
    "load_latest": "checkpoints",
    "make_step": "step",
    "read_metrics": "metrics",
    "save_checkpoint": "checkpoints",
    "state_shardings": "state",
    "train": "loop",
}
__all__ = [
    "Checkpoints",
    "Growing",
    "Progress",
    "TrainSpec",
    "TrainState",
    "Trained",
    "estimate_scale",
    "final_params",
    "init_state",
    "learning_rate",
    "load_latest",
    "make_step",
    "read_metrics",
    "save_checkpoint",
    "state_shardings",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
