"""Label smoothing: targets that leave some doubt."""

from dtrain.callback import Callback
from dtrain.callbacks.targets import Place, put, with_soft_targets
from dtrain.context import Context, Step
from dtrain.errors import ConfigError


class LabelSmoothing(Callback):
    """Mixes the targets of training batches with the uniform distribution over classes.

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
        target: where a batch has its targets, if it is no pair ``(x, y)``: a key such as
            ``"labels"``, a place in a tuple, or several, for what is nested: ``(1, "labels")``.
    """

    def __init__(self, eps: float, num_classes: int, *, target: Place | None = None) -> None:
        if not 0 <= eps < 1 or num_classes < 2:
            raise ConfigError(
                f"LabelSmoothing(eps={eps}, num_classes={num_classes}): eps must be from 0 to "
                "below 1, and there must be 2 classes or more"
            )
        self._eps = eps
        self._num_classes = num_classes
        self._target = target

    def on_batch(self, ctx: Context, step: Step) -> None:
        classes = self._num_classes
        batch, place, y = with_soft_targets("LabelSmoothing", step.batch, self._target, classes)
        step.batch = put(batch, place, (1 - self._eps) * y + self._eps / classes)
