"""Tasks: per task the data sets, reference models, the loss and the metrics."""

from fewbits.tasks.classification import cross_entropy, evaluate, predict
from fewbits.tasks.models import build_model
from fewbits.tasks.sources import load
from fewbits.tasks.weights import load_weights

__all__ = ["build_model", "cross_entropy", "evaluate", "load", "load_weights", "predict"]
