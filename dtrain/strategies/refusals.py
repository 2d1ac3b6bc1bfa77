"""What cannot be done with a model in shards, and would fail in words of autograd's or none."""

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from torch import Tensor, nn

from dtrain.callback import Callback
from dtrain.distributed import some_of
from dtrain.errors import ConfigError

GATHERS = (
    "comm.gather_with_grad does not work under strategy='fsdp' yet: a rank without a batch could "
    "not take part. Use 'ddp' or 'flat', or a loss over each rank's own samples"
)
_EARLY = (
    "the loss function (or on_batch, on_loss) took a gradient through the model, as by torch."
    "autograd.grad for a gradient penalty, a jvp or backward(), which does not work with "
    "strategy='fsdp': a block's parameters are let go of after its backward, and are not there for "
    "the step's own. Use 'ddp' or 'flat', or a penalty that takes forwards only"
)
_COPIES = (
    "a model in shards cannot be copied (copy.deepcopy), for this rank has some rows of it only: "
    "make a new one, and load the run's weights (dtrain.load_model); or gather them one by one, on "
    "all ranks, by p.full_tensor(). For averaged weights use callbacks.EMA"
)


def refuse_whole_weights(callbacks: Iterable[Callback]) -> None:
    """Raises ConfigError where a callback says that it works on whole weights."""
    if whole := [callback.name for callback in callbacks if callback.whole_weights]:
        raise ConfigError(
            f"{some_of(whole)}: works on whole weights, and with strategy='fsdp' each rank "
            "holds some rows only. Leave it out, or use 'ddp' or 'flat'"
        )


def refuse_early_backward(states: Iterable[Any], in_forward: Callable[[], bool]) -> None:
    """Has sharded modules' states raise ConfigError where a backward comes before the step's own.

    Else it fails somewhere in autograd ("setStorage: ..."), or reduces what other ranks do not.
    """
    for state in states:
        state._pre_backward = _guarded(state._pre_backward, in_forward)


def _guarded(
    pre_backward: Callable[[Tensor], Tensor], in_forward: Callable[[], bool]
) -> Callable[[Tensor], Tensor]:
    def guarded(grad: Tensor) -> Tensor:
        if in_forward():
            raise ConfigError(_EARLY)
        return pre_backward(grad)

    return guarded


def refuse_copies(model: nn.Module) -> None:
    """Has a model raise ConfigError where it is copied."""
    vars(model)["__deepcopy__"] = _no_copy


def _no_copy(memo: Any) -> NoReturn:
    raise ConfigError(_COPIES)
