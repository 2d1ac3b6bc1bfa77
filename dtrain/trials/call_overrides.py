"""What a training computes with: float64 throughout, and without dropout if told so."""

import inspect
import sys
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_LOWER = (torch.float32, torch.float16, torch.bfloat16)
_CASTS = (torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16)
# What drops out, and what it calls the probability and the switch for training, if there is one.
_DROPOUTS: dict[Any, tuple[str, str]] = {
    F.dropout: ("p", "training"),
    F.dropout1d: ("p", "training"),
    F.dropout2d: ("p", "training"),
    F.dropout3d: ("p", "training"),
    F.alpha_dropout: ("p", "training"),
    F.feature_alpha_dropout: ("p", "training"),
    F.multi_head_attention_forward: ("dropout_p", "training"),
    F.scaled_dot_product_attention: ("dropout_p", ""),
    torch.dropout: ("p", "train"),
    torch.alpha_dropout: ("p", "train"),
    torch.feature_dropout: ("p", "train"),
    torch.native_dropout: ("p", "train"),
}
# Here a dtype says what bytes mean, also those that ranks and workers send one another.
_READING = (torch.Tensor.view, torch.frombuffer)
_READERS = ("torch._utils", "torch.multiprocessing", "torch.storage", "dtrain.distributed")
_RECURRENT = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)


class CallOverrides(TorchFunctionMode):
    """Lies around a training, and changes dtypes, dropout and BatchNorm in what it calls.

    It sees each of torch's functions as it is called, from modules and the user's own code alike:
    ``F.dropout`` as well as ``nn.Dropout``, and ``logits.float()``, which would round.
    """

    def __init__(self, *, double: bool, without: frozenset[str]) -> None:
        super().__init__()
        self._double = double  # lower floating dtypes become float64
        self._without = without  # of dropout and batchnorm: what is switched off
        self.seen: set[str] = set()  # of the two: what was in effect, or would have been

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._double and not _reads_bytes(func):
            if func in _CASTS:
                func = torch.Tensor.double
            args = tuple(_wide(value) for value in args)
            kwargs = {name: _wide(value) for name, value in kwargs.items()}
        if func in _DROPOUTS:
            p, training = _DROPOUTS[func]
            args, kwargs = (), _by_name(func, args, kwargs)
            if kwargs.get(p, 0.0) > 0 and kwargs.get(training, True):
                kwargs[p] = self._note("dropout", kwargs[p], 0.0)
        elif func in _RECURRENT:
            # (input, hx, weights, has_biases, layers, dropout, training, ...), and with packed
            # sequences one more in front.
            at = 5 if isinstance(args[3], bool) else 6
            if args[at] > 0 and args[at + 1]:
                p = self._note("dropout", args[at], 0.0)
                args = (*args[:at], p, *args[at + 1 :])
        elif func is F.batch_norm:
            args, kwargs = (), _by_name(func, args, kwargs)
            if kwargs["training"]:
                kwargs["training"] = self._note("batchnorm", True, False)
                if not kwargs["training"] and kwargs["running_mean"] is None:
                    channels = kwargs["input"].shape[1]
                    kwargs["running_mean"] = kwargs["input"].new_zeros(channels)
                    kwargs["running_var"] = kwargs["input"].new_ones(channels)
        return func(*args, **kwargs)

    def _note(self, what: str, as_it_is: Any, switched_off: Any) -> Any:
        self.seen.add(what)
        return switched_off if what in self._without else as_it_is


def _by_name(func: Any, args: tuple[Any, ...], kwargs: Any) -> dict[str, Any]:
    if inspect.isfunction(func):
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments
    # What is built in has no signature.
    attention = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    names = attention if func is F.scaled_dot_product_attention else ("input", "p", "train")
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _reads_bytes(func: Any) -> bool:
    caller = sys._getframe(2).f_globals.get("__name__", "")
    return func in _READING or caller.startswith(_READERS)


def _wide(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _LOWER else value
