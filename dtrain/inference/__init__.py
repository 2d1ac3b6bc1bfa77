"""What a Trainer does with a model besides training it: it evaluates and predicts."""

from dtrain.inference.inference import Inference

__all__ = ["Inference"]
