"""What a training computes with: float64 throughout, and without dropout if told so."""

import inspect
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_LOWER = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)
# Python functions, and what they call the probability of dropping out.
_DROPOUTS = {
    F.dropout: "p",
    F.dropout1d: "p",
    F.dropout2d: "p",
    F.dropout3d: "p",
    F.alpha_dropout: "p",
    F.feature_alpha_dropout: "p",
    F.multi_head_attention_forward: "dropout_p",
}
# (input, p, train)
_BARE = (torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.native_dropout)
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class CallOverrides(TorchFunctionMode):
    """Lies around a training, and changes dtypes, dropout and BatchNorm in what it calls.

    It sees each of torch's functions as it is called, from modules and the user's own code alike:
    ``F.dropout`` as well as ``nn.Dropout``, and ``logits.float()``, which would round.

    Args:
        double: lower floating dtypes become float64.
        without: may hold ``"dropout"`` and ``"batchnorm"``, which are then switched off.

    Attributes:
        seen: those of the two that were in effect, or would have been.

    Ranks: all, local.
    """

    def __init__(self, *, double: bool, without: frozenset[str]) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._double = double
        self._without = without

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._double:
            if func in _CASTS:
                func = torch.Tensor.double
            args = tuple(_wide(value) for value in args)
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        if func in _DROPOUTS:
            p = _DROPOUTS[func]
            args, kwargs = (), _by_name(func, args, kwargs)
            if kwargs[p] > 0 and kwargs["training"]:
                kwargs[p] = self._note("dropout", kwargs[p], 0.0)
        elif func is F.scaled_dot_product_attention:
            if kwargs.get("dropout_p", 0.0) > 0:
                kwargs = kwargs | {"dropout_p": self._note("dropout", kwargs["dropout_p"], 0.0)}
            elif len(args) > 4 and args[4] > 0:
                args = self._less_at(4, args)
        elif func in _BARE:
            given = dict(zip(("input", "p", "train"), args, strict=False)) | kwargs
            args, kwargs = (given["input"], given["p"], given["train"]), {}
            if given["p"] > 0 and given["train"]:
                args = self._less_at(1, args)
        elif func in _RECURRENT:
            # (input, hx, weights, has_biases, layers, dropout, training, ...), and with packed
            # sequences one more in front.
            at = 5 if isinstance(args[3], bool) else 6
            if args[at] > 0 and args[at + 1]:
                args = self._less_at(at, args)
        elif func is F.batch_norm:
            args, kwargs = (), _by_name(func, args, kwargs)
            if kwargs["training"]:
                kwargs["training"] = self._note("batchnorm", True, False)
                if not kwargs["training"] and kwargs["running_mean"] is None:
                    channels = kwargs["input"].shape[1]
                    kwargs["running_mean"] = kwargs["input"].new_zeros(channels)
                    kwargs["running_var"] = kwargs["input"].new_ones(channels)
        return func(*args, **kwargs)

    def _less_at(self, at: int, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (*args[:at], self._note("dropout", args[at], 0.0), *args[at + 1 :])

    def _note(self, what: str, as_it_is: Any, switched_off: Any) -> Any:
        self.seen.add(what)
        return switched_off if what in self._without else as_it_is


def _by_name(func: Any, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    bound = inspect.signature(func).bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.arguments


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value
