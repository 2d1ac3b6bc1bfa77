"""Label smoothing: targets that leave some doubt."""

from dtrain.callback import Callback
from dtrain.callbacks.targets import soft_targets
from dtrain.context import Context, Step
from dtrain.errors import ConfigError, DataError


class LabelSmoothing(Callback):
    """Mixes the targets of training batches ``(x, y)`` with the uniform distribution over classes.

    ``y = (1 - eps) * onehot(y) + eps / C`` (Szegedy et al., "Rethinking the Inception
    architecture", CVPR 2016). The loss function gets soft targets ``[B, C]``. That is linear in
    the target, so with ``Mixup`` in the list before or after it, the result is the same.
    Evaluation gets its labels as they are; in the loss function, ``hard_labels(y)`` from
    :mod:`dtrain.callbacks` makes class indices of both for metrics. Where the loss is a plain
    cross entropy, ``F.cross_entropy(logits, y, label_smoothing=0.1)`` gives the same without a
    callback, and ``Trainer(eval_fn=...)`` an evaluation without it.

    Args:
        eps: the part of the uniform distribution.
        num_classes: ``C``.
    """

    def __init__(self, eps: float, num_classes: int) -> None:
        if not 0 <= eps < 1 or num_classes < 2:
            raise ConfigError(
                f"LabelSmoothing(eps={eps}, num_classes={num_classes}): eps must be from 0 to "
                "below 1, and there must be 2 classes or more"
            )
        self._eps = eps
        self._num_classes = num_classes

    def on_batch(self, ctx: Context, step: Step) -> None:
        if not isinstance(step.batch, list | tuple) or len(step.batch) != 2:
            raise DataError("LabelSmoothing: a batch must be a pair (x, y)")
        x, y = step.batch
        y = soft_targets("LabelSmoothing", x, y, self._num_classes)
        step.batch = (x, (1 - self._eps) * y + self._eps / self._num_classes)
