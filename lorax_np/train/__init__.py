"""Training: one step, a run that can be stopped at any moment, and what it leaves.  specs/training.md."""

from .config import TrainConfig
from .evaluate import evaluate
from .loop import train
from .passes import Passes
from .run import Result
from .step import Outcome, train_step

__all__ = ["Outcome", "Passes", "Result", "TrainConfig", "evaluate", "train", "train_step"]
