"""Where a start's seconds go, with dtrain and by hand, on a GPU. Prints JSON.

    python benchmarks/gpu_start.py [--device cpu]

Scripts that end after their first step, started in turn: each says how long the interpreter, the
imports, the GPU's context, what is made of the model, and the first step took. The first round,
which finds files on the disk only, is not counted, unless time is too short for another.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

_KINDS = ("by hand", "dtrain")


def first_step(kind: str, device_type: str, began: float) -> None:
    """Takes one step, says when what was done, and ends the process."""
    marks = {"interpreter": time.time()}
    import torch
    from torch import nn
    from torch.nn import functional as F

    marks["import torch"] = time.time()
    if kind == "dtrain":
        import dtrain
        import dtrain.callbacks
        import dtrain.sinks

        marks["import dtrain"] = time.time()
        dtrain.init(seed=0)
        marks["dtrain.init"] = time.time()
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    torch.zeros(1, device=device_type).item()
    marks["context"] = time.time()
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 10)).to(device_type)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def end() -> None:
        if device_type == "cuda":
            torch.cuda.synchronize()
        marks["first step"] = time.time()
        times = [began, *marks.values()]
        parts = {name: b - a for name, a, b in zip(marks, times, times[1:], strict=False)}
        print(json.dumps(parts), flush=True)
        os._exit(0)

    if kind == "by hand":
        marks["optimizer"] = time.time()
        F.cross_entropy(model(x.to(device_type)), y.to(device_type)).backward()
        optimizer.step()
        end()

    class End(dtrain.Callback):
        def on_step_end(self, ctx: dtrain.Context, step: dtrain.Step) -> None:
            end()

    trainer = dtrain.Trainer(
        model, optimizer, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]),
        callbacks=[End()], sinks=[],
    )  # fmt: skip
    marks["Trainer"] = time.time()
    trainer.fit(torch.utils.data.TensorDataset(x, y), batch_size=128, max_steps=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", nargs="?", choices=["start"])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="one round")
    parser.add_argument("--seconds", type=float, default=120.0, help="for all of it")
    parser.add_argument("--first-step", nargs=2, metavar=("KIND", "BEGAN"), help="for itself")
    arguments = parser.parse_args()
    if arguments.first_step:
        kind, began = arguments.first_step
        first_step(kind, arguments.device, float(began))
        return
    rounds: dict[str, list[dict[str, float]]] = {kind: [] for kind in _KINDS}
    began = time.monotonic()
    for number in range(1 if arguments.tiny else 3):
        if number and (time.monotonic() - began) * (number + 1) / number > arguments.seconds:
            break  # another round would take too long
        for kind in _KINDS:
            command = [sys.executable, __file__, "--device", arguments.device]
            command += ["--first-step", kind, str(time.time())]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            rounds[kind].append(json.loads(told.splitlines()[-1]))
    found: dict[str, Any] = {}
    for kind, every_round in rounds.items():
        all_parts = every_round[1:] or every_round
        parts = {name: statistics.median(one[name] for one in all_parts) for name in all_parts[0]}
        found[kind] = {"seconds": sum(parts.values()), "parts": parts}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
