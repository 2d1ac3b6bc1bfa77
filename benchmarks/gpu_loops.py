"""The loops that gpu.py compares, each as its makers recommend it; all do the same work.

AdamW, fused; gradients clipped by norm; a learning rate that changes each step; the same rows, in
order, from pinned memory; the mean loss read once a block. Other defaults are left alone.
"""

from __future__ import annotations

import inspect
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from gpu_models import with_code_of_its_own
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset

import dtrain
from dtrain.callbacks import (
    EMA,
    ClipGradients,
    GradientStats,
    LRSchedule,
    MixedPrecision,
    NonFiniteGuard,
    Throughput,
)

CLIP = 1.0


@dataclass(slots=True)
class Turn:
    """A loop's end of it.

    Attributes:
        step_done: to be called after each step.
        losses: the mean loss of each block.
    """

    step_done: Callable[[], None]
    losses: list[float] = field(default_factory=list)

    def tell(self, total: Tensor, steps: int) -> None:
        """Reads a sum of losses over so many steps, and begins it anew."""
        self.losses.append(total.item() / steps)
        total.zero_()


@dataclass(frozen=True, slots=True)
class Work:
    """What every loop is to do."""

    make: Callable[[], nn.Module]  # from the columns of a batch to its mean loss
    columns: tuple[Tensor, ...]  # of all samples; pinned where there is a GPU
    batch: int
    steps: int
    report_every: int
    device: torch.device
    is_bf16: bool
    compiled: dict[str, Any] | None  # what torch.compile is told; None: it is not compiled

    def model(self) -> tuple[nn.Module, nn.Module]:
        """Returns the model, equal for all loops; and what is to be called instead of it."""
        torch.manual_seed(0)
        model = self.make().to(self.device)
        if self.compiled is None:
            return model, model
        if self.compiled.get("mode") == "reduce-overhead":
            _trees_in_this_thread()
            model = with_code_of_its_own(model)
        return model, torch.compile(model, **self.compiled)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            model.parameters(), lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
        )

    def rate(self, step: int) -> float:
        """Warms up, then falls to a tenth."""
        return min((step + 1) / 10, 1.0) * (1 - 0.9 * min(1.0, step / self.steps))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_bf16)

    def views(self) -> Iterator[list[Tensor]]:
        """Yields batches of rows that follow one another: views of pinned memory."""
        for start in range(0, self.steps * self.batch, self.batch):
            yield [column[start : start + self.batch] for column in self.columns]

    def loader(self) -> DataLoader[Any]:
        """As a user of torch makes it."""
        return DataLoader(
            TensorDataset(*self.columns), self.batch, pin_memory=self.device.type == "cuda"
        )


Run = Callable[[Work, Turn], None]


def _trees_in_this_thread() -> None:
    """Gives the captured graphs of "reduce-overhead" a place, which torch 2.11 has in the main one.

    Each thread has its own then, as each of these loops would in a process of its own.
    """
    trees: Any = import_module("torch._inductor.cudagraph_trees")
    if hasattr(trees.local, "tree_manager_containers"):
        return
    trees.local.tree_manager_containers = {}
    trees.local.tree_manager_locks = defaultdict(threading.Lock)
    stash: Any = torch._C._stash_obj_in_tls  # type: ignore[attr-defined]
    stash("tree_manager_containers", trees.local.tree_manager_containers)
    stash("tree_manager_locks", trees.local.tree_manager_locks)


def tuned(work: Work, turn: Turn) -> None:
    """The hand-written loop, with what is known to make it fast."""
    model, call = work.model()
    optimizer = work.optimizer(model)
    schedule = LambdaLR(optimizer, work.rate)
    losses = torch.zeros((), device=work.device)

    def batches() -> Iterator[list[Tensor]]:
        """Each is on its way while the step before it is computed."""
        ahead: list[Tensor] | None = None
        for rows in work.views():
            coming = [column.to(work.device, non_blocking=True) for column in rows]
            if ahead is not None:
                yield ahead
            ahead = coming
        assert ahead is not None
        yield ahead

    for number, batch in enumerate(batches(), 1):
        optimizer.zero_grad(set_to_none=True)
        with work.autocast():
            loss = call(*batch)
        loss.backward()
        losses += loss.detach()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if number % work.report_every == 0:
            turn.tell(losses, work.report_every)
        turn.step_done()


def captured(work: Work, turn: Turn) -> None:
    """The hand-written loop, whose forward and backward are one captured graph.

    As torch's notes on CUDA graphs have it (whole-network capture); clipping and optimizer are not
    captured.
    """
    model, _ = work.model()
    optimizer = work.optimizer(model)
    schedule = LambdaLR(optimizer, work.rate)
    losses = torch.zeros((), device=work.device)
    static = [
        torch.zeros((work.batch, *column.shape[1:]), dtype=column.dtype, device=work.device)
        for column in work.columns
    ]

    def compute() -> None:
        with work.autocast():
            loss = model(*static)
        loss.backward()
        losses.add_(loss.detach())

    replay = compute
    if work.device.type == "cuda":
        replay = _capture(compute, optimizer)
        losses.zero_()
    for number, rows in enumerate(work.views(), 1):
        for place, column in zip(static, rows, strict=True):
            place.copy_(column, non_blocking=True)
        if work.device.type != "cuda":
            optimizer.zero_grad(set_to_none=True)
        replay()  # which writes all gradients anew
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        if number % work.report_every == 0:
            turn.tell(losses, work.report_every)
        turn.step_done()


def _capture(compute: Callable[[], None], optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """Returns what replays it; gradients then lie where the capture has put them."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            optimizer.zero_grad(set_to_none=True)
            compute()
    torch.cuda.current_stream().wait_stream(beside)
    optimizer.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    # Other threads are at rest, but may be in the middle of something.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        compute()
    return graph.replay


class AfterStep(dtrain.Callback):
    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self._loss: float | None = None

    def on_step_start(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        loss = ctx.metrics.get("train/loss")  # agreed on after a block's last on_step_end
        if loss is not None and loss != self._loss:
            self._turn.losses.append(loss)
        self._loss = loss

    def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
        self._turn.step_done()


def takes_graph() -> bool:
    return "graph" in inspect.signature(dtrain.Trainer).parameters


def ours(work: Work, turn: Turn, *, five: bool = False, graph: bool = False) -> None:
    """Dtrain; with five callbacks more or less, or with its own captured graphs."""
    world = dtrain.init(seed=0)
    assert world.device.type == work.device.type, f"dtrain trains on {world.device}"
    model, call = work.model()
    options: dict[str, Any] = {"graph": True} if graph else {}
    trainer = dtrain.Trainer(
        call,
        work.optimizer(model),
        lambda net, batch: net(*batch),
        callbacks=[
            *([MixedPrecision("bf16")] if work.is_bf16 else []),
            *([EMA(0.999), NonFiniteGuard(), GradientStats(), Throughput()] if five else []),
            ClipGradients(CLIP),
            LRSchedule(lambda optimizer, steps: LambdaLR(optimizer, work.rate)),
            AfterStep(turn),
        ],
        sinks=[],
        **options,
    )
    trainer.fit(
        dtrain.Data(TensorDataset(*work.columns), work.batch, shuffle=False),
        max_steps=work.steps,
        log_every=work.report_every,
    )


def accelerate(work: Work, turn: Turn) -> None:
    from accelerate import Accelerator

    # Compiled by us, as for the others; Accelerate wraps what it is given.
    model, call = work.model()
    precision = "bf16" if work.is_bf16 else "no"
    accelerator = Accelerator(mixed_precision=precision, cpu=work.device.type == "cpu")
    optimizer = work.optimizer(model)
    schedule = LambdaLR(optimizer, work.rate)
    call, optimizer, loader, schedule = accelerator.prepare(
        call, optimizer, work.loader(), schedule
    )
    losses = torch.zeros((), device=work.device)
    for number, batch in enumerate(loader, 1):
        with accelerator.accumulate(call):
            loss = call(*batch)
            accelerator.backward(loss)
            losses += loss.detach()
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(call.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if number % work.report_every == 0:
            turn.tell(losses, work.report_every)
        turn.step_done()


def lightning(work: Work, turn: Turn) -> None:
    name = "lightning.pytorch" if find_spec("lightning") else "pytorch_lightning"
    pl: Any = import_module(name)
    model, call = work.model()

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self._call = [call]  # in a list, so that it is no second submodule
            self._losses = torch.zeros((), device=work.device)

        def training_step(self, batch: list[Tensor], number: int) -> Tensor:
            loss: Tensor = self._call[0](*batch)
            self._losses += loss.detach()
            if (number + 1) % work.report_every == 0:
                turn.tell(self._losses, work.report_every)
            return loss

        def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
            # Not Trainer(gradient_clip_val=...): with 16-bit precision it refuses a fused one.
            nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)

        def configure_optimizers(self) -> dict[str, Any]:
            optimizer = work.optimizer(self.model)
            schedule = {"scheduler": LambdaLR(optimizer, work.rate), "interval": "step"}
            return {"optimizer": optimizer, "lr_scheduler": schedule}

    class Hand(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, *ignored: Any) -> None:
            turn.step_done()

    trainer = pl.Trainer(
        accelerator="cpu" if work.device.type == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed" if work.is_bf16 else "32-true",
        max_steps=work.steps,
        callbacks=[Hand()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), work.loader())


def transformers(work: Work, turn: Turn) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    model, call = work.model()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model
            self._call = [call]  # in a list, so that it is no second submodule

        def forward(self, **columns: Tensor) -> dict[str, Tensor]:
            return {"loss": self._call[0](*columns.values())}

    class TakesTurns(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *ignored: Any, **names: Any) -> None:
            turn.step_done()

        def on_log(self, *ignored: Any, logs: dict[str, float], **names: Any) -> None:
            turn.losses += [logs["loss"]] if "loss" in logs else []

    def collate(rows: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
        return {f"column_{n}": torch.stack(one) for n, one in enumerate(zip(*rows, strict=True))}

    optimizer = work.optimizer(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            Wrapped(),
            TrainingArguments(
                output_dir=folder,
                use_cpu=work.device.type == "cpu",
                bf16=work.is_bf16,
                per_device_train_batch_size=work.batch,
                max_steps=work.steps,
                max_grad_norm=CLIP,
                logging_steps=work.report_every,
                report_to="none",
                save_strategy="no",
                disable_tqdm=True,
                dataloader_pin_memory=work.device.type == "cuda",
                remove_unused_columns=False,
            ),
            data_collator=collate,
            train_dataset=TensorDataset(*work.columns),
            callbacks=[TakesTurns()],
            optimizers=(optimizer, LambdaLR(optimizer, work.rate)),
        )
        trainer.train()


#: By name: the packages of which one must be there, and the loop.
LOOPS: dict[str, tuple[tuple[str, ...], Run]] = {
    "tuned": ((), tuned),
    "again": ((), tuned),
    "dtrain": ((), ours),
    "dtrain, five": ((), partial(ours, five=True)),
    "lightning": (("lightning", "pytorch_lightning"), lightning),
    "accelerate": (("accelerate",), accelerate),
    "transformers": (("transformers",), transformers),
    "captured": ((), captured),
    "dtrain graph": ((), partial(ours, graph=True)),
    "reduce": ((), tuned),
    "dtrain reduce": ((), ours),
}
PEERS = ("lightning", "accelerate", "transformers")
#: These are told to torch.compile for CUDA's sake.
REDUCES = ("reduce", "dtrain reduce")
