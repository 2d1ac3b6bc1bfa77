"""Plants faults at random, and says of each how soon it was named, and the job over.

    python tests/laws/planted.py --seed 1 --number 16

A fault is somewhere (a hook, the data, the loss function, an evaluation, a save), of some kind, on
one of two or three ranks, under torchrun or without a launcher. The same seed plants the same.
"""

import argparse
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAMED_S, OVER_S = 10.0, 15.0  # what is promised
START_S, GIVE_UP_S = 90.0, 60.0
HOOKS = ("on_step_start", "on_batch", "on_loss", "on_grads_ready", "on_step_end")
HOOKS += ("on_epoch_start", "on_epoch_end", "on_eval_start", "on_eval_batch", "on_eval_end")
PLACES = (*HOOKS, "data", "loss_fn", "eval_fn", "on_save")
KINDS = ("stop", "kill", "raise", "exit", "_exit", "collective", "verb")


@dataclass(frozen=True)
class Fault:
    """One fault, and where it is planted."""

    kind: str
    place: str
    rank: int
    size: int
    strategy: str
    launcher: str

    def __str__(self) -> str:
        return (
            f"{self.kind} in {self.place} on rank {self.rank} of {self.size} "
            f"({self.strategy}, {self.launcher})"
        )


@dataclass(frozen=True)
class Found:
    """What became of it."""

    named_s: float | None  # until all other ranks had named the rank; None if one did not
    over_s: float | None  # until no process was left; None where some had to be killed
    codes: list[int | None]
    logs: list[str]

    @property
    def is_kept(self) -> bool:
        """Named and over in time, and no process ended well."""
        return (
            self.named_s is not None
            and self.named_s <= NAMED_S
            and self.over_s is not None
            and self.over_s <= OVER_S
            and all(code != 0 for code in self.codes)
        )


def drawn(seed: int, number: int) -> list[Fault]:
    """Returns faults at random; of so many as there are kinds, one of each."""
    rng = random.Random(seed)
    kinds = [kind for _ in range(number) for kind in rng.sample(KINDS, len(KINDS))]
    faults = []
    for kind in kinds[:number]:
        size = rng.choice((2, 3))
        launcher = "torchrun" if kind == "stop" else rng.choice(("torchrun", "none"))
        place, strategy = rng.choice(PLACES), rng.choice(("flat", "ddp"))
        faults.append(Fault(kind, place, rng.randrange(size), size, strategy, launcher))
    return faults


# -- a rank --------------------------------------------------------------------------------------


def train(folder: Path, kind: str, place: str, strategy: str, bad: int) -> None:
    """What each rank runs."""
    import torch
    import torch.distributed as dist
    from torch import nn

    import dtrain
    from dtrain.callbacks import Checkpoint

    world = dtrain.init(seed=1)
    log = os.open(folder / f"log-{world.rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    seen = [0]

    def plant(where: str) -> None:
        if where != place or world.rank != bad:
            return
        seen[0] += 1
        if seen[0] != (30 if place == "data" else 2 if place in PLACES[6:] else 5):
            return
        aside = folder / ".planted"
        aside.write_text(str(time.time()))
        aside.rename(folder / "planted")
        if kind == "raise":
            raise ValueError("planted")
        if kind == "exit":
            sys.exit(3)
        if kind == "_exit":
            os._exit(3)
        if kind == "collective":
            dist.barrier()
        if kind == "verb":
            world.comm.barrier("alone")
        if kind in ("stop", "kill"):
            os.kill(os.getpid(), signal.SIGSTOP if kind == "stop" else signal.SIGKILL)

    class Rows:
        def __len__(self) -> int:
            return 64

        def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
            plant("data")
            x = torch.full((3,), float(row)) / 64
            return x, x.sum(0, keepdim=True)

    def loss_in(where: str):
        def loss_fn(model, batch):
            plant(where)
            return (model(batch[0]) - batch[1]).square().mean()

        return loss_fn

    def hook(name: str):
        takes = {"on_eval_end": "ctx, metrics"}.get(name, "ctx")
        if name in (*HOOKS[:5], "on_eval_batch"):
            takes = "ctx, step"
        names: dict = {"plant": plant}
        exec(f"def {name}(self, {takes}): plant({name!r})", names)
        return names[name]

    hooks = {name: hook(name) for name in (*HOOKS, "on_save")}
    planted = type("Planted", (dtrain.Callback,), hooks)()
    model = nn.Linear(3, 1)
    trainer = dtrain.Trainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.01),
        loss_in("loss_fn"),
        eval_fn=loss_in("eval_fn"),
        callbacks=[planted, Checkpoint(every_epochs=1)],
        sinks=[],
        strategy=strategy,
        run_dir=folder / "run",
    )
    trainer.fit(Rows(), batch_size=6, epochs=20, eval_set=Rows())


# -- a job ---------------------------------------------------------------------------------------


def environment(**variables: str) -> dict[str, str]:
    """Without launchers' traces, and with this very dtrain."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "NODE_RANK")
    launchers += ("NNODES", "RDZV_", "TORCHELASTIC_", "TORCH_DIST", "SLURM_", "PYTHONWARNINGS")
    env = {key: value for key, value in os.environ.items() if not key.startswith(launchers)}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    env["PYTHONPATH"] = f"{ROOT}:{env.get('PYTHONPATH', '')}"
    return env | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | variables


def free_job() -> int:
    """A SLURM job whose port, which follows from its number, is not taken."""
    for job in range(os.getpid(), os.getpid() + 1000):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 20000 + job % 20000)) != 0:
                return job
    raise RuntimeError("no free port in a thousand")


def start(fault: Fault, folder: Path, me: list[str] | None = None) -> list[subprocess.Popen[bytes]]:
    """Starts the job, or that of another script with its arguments, ``me``."""
    if me is None:
        me = [str(Path(__file__).resolve()), "--train", str(folder), fault.kind, fault.place]
        me += [fault.strategy, str(fault.rank)]
    if fault.launcher == "torchrun":
        commands = [["bash", str(ROOT / "launch" / "torchrun.sh"), *me]]
        envs = [environment(RANKS=str(fault.size))]
    else:
        commands = [[sys.executable, *me]] * fault.size
        job, size = str(free_job()), str(fault.size)
        envs = [
            environment(
                SLURM_JOB_ID=job,
                SLURM_JOB_NODELIST="localhost",
                SLURM_LOCALID=str(rank),
                SLURM_PROCID=str(rank),
                SLURM_STEP_NODELIST="localhost",
                SLURM_STEP_NUM_TASKS=size,
                SLURM_STEP_TASKS_PER_NODE=size,
            )
            for rank in range(fault.size)
        ]
    with (folder / "launcher").open("wb") as log:
        given = {"cwd": folder, "stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
        return [
            subprocess.Popen(command, env=env, start_new_session=True, **given)
            for command, env in zip(commands, envs, strict=True)
        ]


def run(fault: Fault, folder: Path) -> Found:
    """Runs a job to its end, or kills it where there is none."""
    processes = start(fault, folder)
    logs = [folder / f"log-{rank}" for rank in range(fault.size)]
    name = rf"\branks? ([\d, ]*\b)?{fault.rank}\b"
    named = re.compile(rf"(stops|no longer moves|Error: )[\s\S]*{name}")

    def read(log: Path) -> str:
        return log.read_text(errors="replace") if log.exists() else ""

    began, planted_at, named_s = time.time(), None, None
    try:
        while any(process.poll() is None for process in processes):
            now = time.time()
            if planted_at is None and (folder / "planted").exists():
                planted_at = float((folder / "planted").read_text())
            if planted_at is None and now - began > START_S:
                break
            if planted_at is not None:
                others = [read(log) for rank, log in enumerate(logs) if rank != fault.rank]
                if named_s is None and all(map(named.search, others)):
                    named_s = now - planted_at
                if now - planted_at > GIVE_UP_S:
                    break
            threading.Event().wait(0.05)
        over = planted_at is not None and all(p.poll() is not None for p in processes)
        over_s = time.time() - planted_at if over and planted_at is not None else None
    finally:
        for process in processes:
            kill(process)
    others = [read(log) for rank, log in enumerate(logs) if rank != fault.rank]
    if named_s is None and over_s is not None and all(map(named.search, others)):
        named_s = over_s
    said = [f"-- launcher:\n{read(folder / 'launcher')}"]
    said += [f"-- rank {rank}:\n{read(log)}" for rank, log in enumerate(logs)]
    return Found(named_s, over_s, [process.returncode for process in processes], said)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a process and all that it has started, if it has not ended."""
    if process.poll() is None:
        for pid in [*descendants(process.pid), process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.wait()


def descendants(pid: int) -> list[int]:
    """Returns the children of a process, and theirs."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [one for child in map(int, children) for one in (child, *descendants(child))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--number", type=int, default=16)
    parser.add_argument("--train", nargs=5, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.train:
        folder, kind, place, strategy, bad = given.train
        train(Path(folder), kind, place, strategy, int(bad))
        return 0
    kept = 0
    for number, fault in enumerate(drawn(given.seed, given.number), 1):
        with tempfile.TemporaryDirectory() as folder:
            found = run(fault, Path(folder))
        kept += found.is_kept
        named = "never" if found.named_s is None else f"after {found.named_s:.1f} s"
        over = "never" if found.over_s is None else f"after {found.over_s:.1f} s"
        print(f"{number:3} {fault}: named {named}, over {over}", flush=True)
        if not found.is_kept:
            print(*found.logs, sep="\n", flush=True)
    print(
        f"seed {given.seed}: {kept} of {given.number} named within {NAMED_S:g} s, over within "
        f"{OVER_S:g} s"
    )
    return int(kept != given.number)


if __name__ == "__main__":
    sys.exit(main())
