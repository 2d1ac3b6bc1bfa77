"""Other frameworks' loops, as their guides recommend them, for benchmarks/overhead.py.

All do the work of benchmarks/handwritten.py's "plain" loop: torch's AdamW with its defaults,
clipping by norm, a learning rate that rises each step, shuffled batches fetched in this process,
DDP over gloo where there are several ranks, and the mean loss over ranks logged once in a block,
each by its framework's own means where it has any. Progress bars and checkpoints are off, other
defaults are left alone. Where one had to be changed to have the same work done, a comment says so.

A function trains one epoch, which is exactly as many steps as `turns` wants.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader, TensorDataset
from turns import Turns
from workloads import Workload, loss_of

# Without torchrun there is one rank.
RANKS = int(os.environ.get("WORLD_SIZE", "1"))
LOCAL_RANKS = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def dataset_for(workload: Workload, turns: Turns) -> TensorDataset:
    """What turns.dataset() gives, also before the process group is open."""
    return workload.dataset(turns.steps_in_all, RANKS)


def fabric(workload: Workload, turns: Turns, folder: Path) -> None:
    from lightning.fabric import Fabric
    from lightning.fabric.loggers import CSVLogger

    fabric = Fabric(
        accelerator="cpu",
        devices=LOCAL_RANKS,
        strategy="ddp" if RANKS > 1 else "auto",
        loggers=CSVLogger(folder, name="fabric", flush_logs_every_n_steps=1),
    )
    fabric.launch()
    model = workload.model()
    optimizer: Any = AdamW(model.parameters(), lr=1e-3)
    scheduler = LinearLR(optimizer, total_iters=1000)
    replica, optimizer = fabric.setup(model, optimizer)
    loader = DataLoader(dataset_for(workload, turns), workload.micro_batch_size, shuffle=True)
    total = torch.zeros(())
    for step, batch in enumerate(fabric.setup_dataloaders(loader), 1):
        optimizer.zero_grad()
        loss = loss_of(replica, batch)
        fabric.backward(loss)
        fabric.clip_gradients(replica, optimizer, max_norm=1.0)
        optimizer.step()
        scheduler.step()
        total += loss.detach()
        if step % workload.block == 0:
            mean = fabric.all_reduce(total / workload.block, reduce_op="mean")
            fabric.log("loss", mean.item(), step)
            total.zero_()
        turns.step_is_over()


def lightning(workload: Workload, turns: Turns, folder: Path) -> None:
    import lightning as L
    from lightning.pytorch.loggers import CSVLogger

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = workload.model()
            self.total = torch.zeros(())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = loss_of(self.model, batch)
            self.total += loss.detach()
            # To log each step's loss with sync_dist=True would be an all-reduce a step.
            if (batch_idx + 1) % workload.block == 0:
                self.log("loss", self.total / workload.block, sync_dist=True)
                self.total.zero_()
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = AdamW(self.parameters(), lr=1e-3)
            scheduler = LinearLR(optimizer, total_iters=1000)
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    class TakesTurns(L.Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            turns.step_is_over()

    trainer = L.Trainer(
        accelerator="cpu",
        devices=LOCAL_RANKS,
        strategy="ddp" if RANKS > 1 else "auto",
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=CSVLogger(folder, name="lightning"),
        log_every_n_steps=workload.block,
        callbacks=[TakesTurns()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(dataset_for(workload, turns), workload.micro_batch_size, shuffle=True)
    trainer.fit(Module(), loader)


def accelerate(workload: Workload, turns: Turns, folder: Path) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=True,
        log_with="tensorboard",
        project_dir=folder / "accelerate",
        # Else its scheduler takes one step for each rank, and so W steps a step.
        step_scheduler_with_optimizer=False,
    )
    accelerator.init_trackers("overhead")
    model = workload.model()
    optimizer = AdamW(model.parameters(), lr=1e-3)
    scheduler = LinearLR(optimizer, total_iters=1000)
    loader = DataLoader(dataset_for(workload, turns), workload.micro_batch_size, shuffle=True)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    total = torch.zeros(())
    for step, batch in enumerate(loader, 1):
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        total += loss.detach()
        if step % workload.block == 0:
            mean = accelerator.reduce(total / workload.block, reduction="mean")
            accelerator.log({"loss": mean.item()}, step=step)
            total.zero_()
        turns.step_is_over()
    accelerator.end_training()


def ignite(workload: Workload, turns: Turns, folder: Path) -> None:
    import ignite.distributed as idist
    from ignite.engine import Engine, Events
    from ignite.handlers import TensorboardLogger
    from ignite.metrics import Average, MetricUsage

    def train(local_rank: int) -> None:
        model = idist.auto_model(workload.model())
        optimizer = idist.auto_optim(AdamW(model.parameters(), lr=1e-3))
        loader = idist.auto_dataloader(
            dataset_for(workload, turns),
            batch_size=workload.micro_batch_size * RANKS,
            shuffle=True,
            num_workers=0,
        )

        def update(engine: Engine, batch: Any) -> Tensor:
            model.train()
            optimizer.zero_grad()
            loss = loss_of(model, batch)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            return loss.detach()

        trainer = Engine(update)
        # Not by its LRScheduler, which multiplies the first step's factor of 1/3 in twice.
        scheduler = LinearLR(optimizer, total_iters=1000)
        trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: scheduler.step())
        # A mean over the block's steps and all ranks.
        block_begins = Events.ITERATION_STARTED(
            event_filter=lambda engine, step: step % workload.block == 1
        )
        block_ends = Events.ITERATION_COMPLETED(every=workload.block)
        usage = MetricUsage(block_begins, block_ends, Events.ITERATION_COMPLETED)
        Average().attach(trainer, "loss", usage=usage)
        logger = TensorboardLogger(log_dir=folder / "ignite") if idist.get_rank() == 0 else None
        if logger is not None:
            logger.attach_output_handler(
                trainer, event_name=block_ends, tag="training", metric_names=["loss"]
            )
        trainer.add_event_handler(Events.ITERATION_COMPLETED, turns.step_is_over)
        trainer.run(loader, max_epochs=1)
        if logger is not None:
            logger.close()

    with idist.Parallel(backend="gloo" if RANKS > 1 else None) as parallel:
        parallel.run(train)


def transformers(workload: Workload, turns: Turns, folder: Path) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = workload.model()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": loss_of(self.model, (x, labels))}

    class TakesTurns(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.step_is_over()

    def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        xs, labels = zip(*rows, strict=True)
        return {"x": torch.stack(xs), "labels": torch.stack(labels)}

    model = WithLoss()
    # Left to itself, it would take a fused AdamW, as no other loop here does.
    optimizer = AdamW(model.parameters(), lr=1e-3)
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder / "transformers"),
            use_cpu=True,
            ddp_backend="gloo" if RANKS > 1 else None,
            # On by default for a model that is not one of its own.
            ddp_find_unused_parameters=False if RANKS > 1 else None,
            per_device_train_batch_size=workload.micro_batch_size,
            num_train_epochs=1,
            max_grad_norm=1.0,
            logging_steps=workload.block,
            report_to="none",  # it prints
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        data_collator=collate,
        train_dataset=dataset_for(workload, turns),
        callbacks=[TakesTurns()],
        optimizers=(optimizer, LinearLR(optimizer, total_iters=1000)),
    )
    trainer.train()


def fastai(workload: Workload, turns: Turns, folder: Path) -> None:
    from fastai.callback.core import Callback
    from fastai.callback.schedule import ParamScheduler
    from fastai.callback.training import GradientClip
    from fastai.data.core import DataLoaders
    from fastai.data.load import DataLoader
    from fastai.distributed import DistributedDL
    from fastai.learner import Learner
    from fastai.optimizer import OptimWrapper
    from fastai.torch_core import maybe_gather, rank_distrib

    class OverGloo(DistributedDL):
        """Its own one sends the order of samples over CUDA alone."""

        def _broadcast(self, t: Any, rank: int) -> Any:
            order = torch.tensor(list(t))
            torch.distributed.broadcast(order, rank)
            return order.tolist()

    class LogsTheMean(Callback):
        def before_fit(self) -> None:
            self.total = torch.zeros(())

        def after_batch(self) -> None:
            if not self.training:
                return
            self.total += self.learn.loss.detach()
            if self.train_iter % workload.block == 0:
                mean = maybe_gather(self.total / workload.block).mean().item()
                if rank_distrib() == 0:
                    print({"step": self.train_iter, "loss": mean})
                self.total.zero_()

    class TakesTurns(Callback):
        order = 100

        def after_batch(self) -> None:
            if self.training:
                turns.step_is_over()

    def learning_rate(done: float) -> float:
        """LinearLR's, from the part of the training that is done."""
        return 1e-3 * (1 / 3 + 2 / 3 * min(1.0, done * turns.steps_in_all / 1000))

    def loader(dataset: TensorDataset, *, shuffle: bool) -> Any:
        one = DataLoader(dataset, bs=workload.micro_batch_size, shuffle=shuffle, num_workers=0)
        return OverGloo(one) if RANKS > 1 else one

    def fit() -> None:
        learner.fit(1, lr=1e-3)

    learner = Learner(
        DataLoaders(
            loader(dataset_for(workload, turns), shuffle=True),
            loader(workload.dataset(2, RANKS), shuffle=False),  # it evaluates after each epoch
            device=torch.device("cpu"),
        ),
        workload.model(),
        loss_func=F.cross_entropy,
        opt_func=partial(OptimWrapper, opt=AdamW),
        path=folder,
        cbs=[
            GradientClip(1.0),
            ParamScheduler({"lr": learning_rate}),
            LogsTheMean(),
            TakesTurns(),
        ],
    )
    with learner.no_bar(), learner.no_logging():
        if RANKS == 1:
            fit()
            return
        with learner.distrib_ctx(sync_bn=False, cpu=True):
            fit()


def pytorch_accelerated(workload: Workload, turns: Turns, folder: Path) -> None:
    # Its Trainer asks for no device, so that Accelerate must be told like this.
    os.environ["ACCELERATE_USE_CPU"] = "true"
    from pytorch_accelerated import Trainer
    from pytorch_accelerated.callbacks import ProgressBarCallback, TrainerCallback
    from pytorch_accelerated.trainer import DEFAULT_CALLBACKS

    class LogsTheMean(TrainerCallback):
        def on_train_epoch_start(self, trainer: Any, **kwargs: Any) -> None:
            self.total = torch.zeros(1)

        def on_train_step_end(
            self, trainer: Any, batch_output: Any, step: int, **kwargs: Any
        ) -> None:
            self.total += batch_output["loss"].detach()
            if (step + 1) % workload.block == 0:
                mean = trainer.gather(self.total / workload.block).mean().item()
                trainer.run_history.update_metric("train_loss", mean)
                trainer.print(f"train_loss: {mean}")
                self.total.zero_()

    class ByNorm(Trainer):
        def _clip_gradients(self) -> None:
            # Its own clips by value.
            self._accelerator.clip_grad_norm_(self.model.parameters(), 1.0)

        def optimizer_zero_grad(self) -> None:
            super().optimizer_zero_grad()
            turns.step_is_over()  # on_train_step_end comes before backward

    model = workload.model()
    trainer = ByNorm(
        model,
        F.cross_entropy,
        AdamW(model.parameters(), lr=1e-3),
        callbacks=[*(c for c in DEFAULT_CALLBACKS if c is not ProgressBarCallback), LogsTheMean],
    )
    trainer.train(
        dataset_for(workload, turns),
        num_epochs=1,
        per_device_batch_size=workload.micro_batch_size,
        gradient_clip_value=1.0,
        create_scheduler_fn=partial(LinearLR, total_iters=1000),
        train_dataloader_kwargs={"num_workers": 0},
    )


PEERS: dict[str, Callable[[Workload, Turns, Path], None]] = {
    "fabric": fabric,
    "lightning": lightning,
    "accelerate": accelerate,
    "ignite": ignite,
    "transformers": transformers,
    "fastai": fastai,
    "pytorch-accelerated": pytorch_accelerated,
}
