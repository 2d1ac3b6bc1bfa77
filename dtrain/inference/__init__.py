"""What a Trainer does with a model besides training it: it evaluates and predicts."""

from dtrain.inference.inference import Inference
from dtrain.inference.parts import load_predictions

__all__ = ["Inference", "load_predictions"]
