"""A byte-level GPT on the Python standard library's own source: no download, real text.

    bash launch/torchrun.sh examples/gpt.py --size tiny --run-dir runs/gpt

What it shows: a loss weighted by tokens (files end where they end, so windows differ in
length), weight decay for matrices only, warm-up and cosine, clipping, accumulation by
micro-batch size, averaged weights for evaluation, and text generated at each evaluation.
With ``--strategy fsdp`` the model is sharded over the ranks, and without the last; with
``--tensor 2`` layers are sliced over two neighbouring ranks besides (four are needed).
"""

import argparse
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import dtrain
from dtrain import schedules
from dtrain.callbacks import (
    EMA,
    Checkpoint,
    ClipGradients,
    GradientAccumulation,
    LRSchedule,
    MixedPrecision,
    Throughput,
)
from dtrain.sinks import Console, JSONLines
from dtrain.strategies import FSDP

VOCABULARY = 256
PADDING = -100  # what cross_entropy leaves out


@dataclass(frozen=True)
class Size:
    layers: int
    heads: int
    width: int
    context: int
    batch_size: int  # windows in a global batch
    micro_batch_size: int
    lr: float
    steps: int


SIZES = {
    "tiny": Size(3, 4, 128, 128, 32, 16, 3e-3, 1200),
    "small": Size(6, 6, 384, 256, 64, 16, 1e-3, 5_000),
    "124m": Size(12, 12, 768, 1024, 512, 16, 6e-4, 20_000),
}


class Windows(torch.utils.data.Dataset):
    """Windows of ``context`` bytes and the byte after each; the last of a file is shorter."""

    def __init__(self, files: list[Path], context: int) -> None:
        self.context = context
        texts = [torch.frombuffer(bytearray(f.read_bytes()), dtype=torch.uint8) for f in files]
        self.windows = [w for t in texts for w in t.split(context) if len(w) > 1]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.windows[index].long()
        inputs = torch.zeros(self.context - 1, dtype=torch.long)
        targets = torch.full((self.context - 1,), PADDING)
        inputs[: len(window) - 1] = window[:-1]
        targets[: len(window) - 1] = window[1:]
        return inputs, targets


def library(context: int) -> tuple[Windows, Windows]:
    """Training and validation windows: every 20th module is for validation."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return (
        Windows([f for i, f in enumerate(files) if i % 20], context),
        Windows(files[::20], context),
    )


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.mix = nn.Linear(size.width, size.width)
        self.up = nn.Linear(size.width, 4 * size.width)
        self.down = nn.Linear(4 * size.width, size.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        # By heads first, of which a rank may have a slice: see `slices`.
        qkv = self.qkv(self.norm1(x)).view(batch, length, -1, 3, width // self.heads)
        q, k, v = qkv.permute(3, 0, 2, 1, 4)  # each [batch, heads, length, width of a head]
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.mix(heads.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.context = size.context
        self.bytes = nn.Embedding(VOCABULARY, size.width)
        self.places = nn.Embedding(size.context, size.width)
        self.blocks = nn.Sequential(*[Block(size) for _ in range(size.layers)])
        self.norm = nn.LayerNorm(size.width)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                deep = name.endswith(("mix.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * size.layers) if deep else 0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """From bytes [batch, length] to logits [batch, length, 256]."""
        x = self.bytes(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        return F.linear(self.norm(self.blocks(x)), self.bytes.weight)

    @torch.no_grad()
    def generate(self, prompt: str, length: int, seed: int = 0) -> str:
        device = self.bytes.weight.device
        generator = torch.Generator(device).manual_seed(seed)
        ids = torch.tensor([list(prompt.encode())], device=device)
        for _ in range(length):
            logits = self(ids[:, -self.context :])[0, -1] / 0.8
            chosen = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)
            ids = torch.cat([ids, chosen[None]], dim=1)
        return bytes(ids[0].tolist()).decode(errors="replace")


def slices(model: nn.Module) -> dict[str, Any]:
    """Which layers are sliced over neighbouring ranks, and how; for ``--tensor``.

    Heads and hidden units are shared out: two sums over these ranks in each block.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    first, then = ColwiseParallel, RowwiseParallel
    plan = {"qkv": first(), "mix": then(), "up": first(), "down": then()}
    return {f"blocks.*.{name}": style for name, style in plan.items()}


def loss_fn(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> dtrain.Loss:
    inputs, targets = batch
    logits = model(inputs)
    total = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
    # A mean over tokens, not over windows: the same at any number of ranks and micro-batches.
    return dtrain.Loss.from_sum(total, weight=(targets != PADDING).sum())


class Write(dtrain.Callback):
    """Lets the model write a few lines at each evaluation."""

    def on_eval_end(self, ctx: dtrain.Context, metrics: dict[str, float]) -> None:
        text = ctx.comm.on_main("write", lambda: ctx.model.generate("def ", 200))
        ctx.show("the model writes", text=text)


def decay_groups(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Weight decay for matrices; none for biases and norms."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, help="global steps; by size if left out")
    parser.add_argument("--batch-size", type=int, help="windows in a global batch")
    parser.add_argument("--micro-batch-size", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument(
        "--tensor", type=int, default=1, help="ranks for slices of layers, with fsdp"
    )
    parser.add_argument("--strategy", choices=["auto", "ddp", "flat", "fsdp"], default="auto")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--run-dir", default="runs/gpt")
    parser.add_argument("--resume", choices=["auto", "never", "must"], default="auto")
    args = parser.parse_args()
    size = SIZES[args.size]
    steps = args.steps or size.steps

    world = dtrain.init(seed=args.seed)
    train_set, val_set = library(size.context)
    model = GPT(size)
    sliced = FSDP(tensor=args.tensor, plan=slices) if args.tensor > 1 else None
    # Sharded, no rank could write by itself. It writes with the averages.
    writes = [] if sliced or args.strategy == "fsdp" else [Write()]
    trainer = dtrain.Trainer(
        model,
        decay_groups(model, args.lr or size.lr),
        loss_fn,
        callbacks=[
            *([] if args.precision == "fp32" else [MixedPrecision(args.precision)]),
            GradientAccumulation(micro_batch_size=args.micro_batch_size or size.micro_batch_size),
            ClipGradients(max_norm=1.0),
            LRSchedule(schedules.warmup_cosine(max(1, steps // 20), final_fraction=0.1)),
            Throughput(tokens_per_sample=size.context),
            *writes,
            EMA(decay=0.99),
            Checkpoint(every_steps=max(1, steps // 4), keep=2),
        ],
        sinks=[Console(), JSONLines()],
        strategy=sliced or args.strategy,
        run_dir=args.run_dir,
        config=vars(args),
    )
    result = trainer.fit(
        train_set,
        batch_size=args.batch_size or size.batch_size,
        max_steps=steps,
        eval_set=torch.utils.data.Subset(val_set, range(0, len(val_set), 10)),
        eval_every=max(1, steps // 4),
        log_every=20,
        resume=args.resume,
    )
    if world.is_main:
        print(f"validation loss: {result.metrics['eval/loss']:.3f} nats per byte")


if __name__ == "__main__":
    main()
