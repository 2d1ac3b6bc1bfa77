"""examples/ppo.py gives what the loop that it spares gives, also where it is killed and goes on."""

import copy
import importlib.util
import os
import random
import signal
from functools import cache
from pathlib import Path

import pytest
import tiny
import torch
from torch.nn import functional as F

import dtrain
from dtrain.callbacks import Checkpoint, ClipGradients, GradientAccumulation
from dtrain.data import Shuffled
from dtrain.distributed import derive_seed
from dtrain.testing import run_outcomes, run_processes

PPO = Path(__file__).parents[2] / "examples" / "ppo.py"
SEED, BATCH_SIZE, EPOCHS = 5, 22, 2
SIZE = {"poles": 5, "steps": 10}  # 50 samples, and so 3 steps an epoch, 6 a fit


@cache
def loaded():
    spec = importlib.util.spec_from_file_location("ppo", PPO)
    ppo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ppo)
    return ppo


def made():
    ppo = loaded()
    torch.manual_seed(3)
    networks = ppo.make_networks()
    return ppo, networks, ppo.make_optimizer(networks)


@cache
def by_hand(iterations=3):
    """Plain torch: one process, the whole batch at once, and an old policy beside the new."""
    ppo, networks, optimizer = made()
    new = networks["new"]
    losses, stood = [], []
    for iteration in range(iterations):
        old = copy.deepcopy(new)
        rollout, steps = ppo.collect(old, SEED, iteration, **SIZE)
        stood.append(steps)
        # A fit's own order of samples (4 is dtrain's number of this stream).
        phase = (iteration,) if iteration else ()
        order = Shuffled(len(rollout), derive_seed(SEED, 4, *phase))
        with torch.no_grad():
            logits = old(rollout.tensors[0])[0]
            before = torch.distributions.Bernoulli(logits=logits).log_prob(
                rollout.tensors[1].double()
            )
        for epoch in range(EPOCHS):
            for place in range(0, len(rollout), BATCH_SIZE):
                stop = min(place + BATCH_SIZE, len(rollout))
                rows = torch.tensor(order.indices(iteration * EPOCHS + epoch, place, stop))
                states, pushes, gains, returns = rollout[rows]
                logit, value = new(states)
                policy = torch.distributions.Bernoulli(logits=logit)
                ratio = (policy.log_prob(pushes.double()) - before[rows]).exp()
                gain = torch.minimum(ratio * gains, ratio.clamp(0.8, 1.2) * gains).mean()
                loss = 0.01 * F.mse_loss(value, returns) - gain - 0.01 * policy.entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(new.parameters(), 0.5)
                optimizer.step()
                losses.append(loss.item())
    return {n: p.detach() for n, p in new.named_parameters()}, losses, stood


class Losses(dtrain.Callback):
    def __init__(self):
        self.values = []

    def on_grads_ready(self, ctx, step):
        self.values.append(step.loss_mean)


class Harm(dtrain.Callback):
    """Sends a signal to this process once a step is done, and where a rollout is to begin."""

    def __init__(self, at_step=None, at_rollout=None, sent=signal.SIGKILL):
        self.at_step, self.at_rollout, self.sent = at_step, at_rollout, sent

    def on_step_end(self, ctx, step):
        if ctx.progress.step == self.at_step:
            os.kill(os.getpid(), self.sent)

    def tell(self, text):
        if self.at_rollout is not None and text.startswith(f"iteration {self.at_rollout}:"):
            os.kill(os.getpid(), self.sent)


def train(strategy="flat", micros=1, run_dir=None, harms=None, iterations=3, **saves):
    """Returns the weights, the losses of this process's steps, and what was told of rollouts."""
    world = dtrain.init(seed=SEED)
    ppo, networks, optimizer = made()
    losses, told = Losses(), []
    harm = Harm(**(harms or {}).get(world.rank, {}))
    trainer = dtrain.Trainer(
        networks,
        optimizer,
        ppo.loss_fn,
        callbacks=[
            GradientAccumulation(micros),
            losses,
            ClipGradients(0.5),
            *([Checkpoint(**saves)] if run_dir else []),
            harm,
        ],
        sinks=[],
        strategy=strategy,
        run_dir=run_dir,
    )

    def tell(text):
        told.append(text)
        harm.tell(text)

    how = {"epochs": EPOCHS, "batch_size": BATCH_SIZE, "tell": tell} | SIZE
    ppo.train(trainer, iterations=iterations, seed=SEED, **how)
    return networks, losses.values, told


def train_some(cases):
    done = [train(*case) for case in cases]
    return [(dict(nets["new"].state_dict()), losses, told) for nets, losses, told in done]


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_example_is_the_loop_by_hand(world_size):
    expected, expected_losses, stood = by_hand()
    cases = [("flat", 1), ("ddp", 2), ("flat", 3)]
    for found in run_processes(train_some, world_size, cases, timeout_s=100):
        for case, (params, losses, told) in zip(cases, found, strict=True):
            assert losses == pytest.approx(expected_losses, rel=1e-12)
            assert told == [
                f"iteration {n}: a pole stands for {steps:.1f} steps"
                for n, steps in enumerate(stood)
            ]
            for name, value in params.items():
                distance = (value - expected[name]).norm() / expected[name].norm()
                assert distance <= 1e-12, f"{case}: {name} is {distance:.1e} away"


def ends(run_dir, harms, saves):
    networks, _, told = train("flat", 1, run_dir, harms, 5, **saves)
    return tiny.digest(networks), told


def test_told_to_leave_within_an_iteration_it_goes_on(tmp_path):
    whole = run_processes(ends, 1, tmp_path / "whole", None, {"every_fits": 2})[0]
    # In the middle of the second fit, and once more just when the third has begun.
    told = []
    for step in (9, 13, None):
        harms = {0: {"at_step": step, "sent": signal.SIGTERM}}
        [end] = run_processes(ends, 1, tmp_path / "run", harms, {"every_fits": 2})
        told.append(end[1])
    assert end[0] == whole[0]
    first, second, third = told
    assert first == whole[1][:2]
    assert second == whole[1][1:3]  # the same rollout again, and then the next
    assert third == whole[1][2:]


@pytest.mark.slow
@pytest.mark.parametrize("saves", [{}, {"every_steps": 4, "every_fits": 2}])
def test_killed_anywhere_it_ends_with_the_same_bits(tmp_path, saves):
    whole = run_processes(ends, 2, tmp_path / "whole", None, saves)
    rng = random.Random(4)
    # Of 30 steps; where one is a fit's last, the next rollout is under way.
    for place in sorted({6, 24, *rng.sample(range(7, 30), 2)}):
        harm = {"at_step": place} if place % 6 else {"at_rollout": place // 6}
        harms = dict.fromkeys(rng.choice([[0], [1], [0, 1]]), harm)
        outcomes = run_outcomes(ends, 2, tmp_path / "run", harms, saves, timeout_s=60)
        killed = {rank for rank, one in enumerate(outcomes) if one.exitcode == -signal.SIGKILL}
        assert killed == {*harms}, [outcome.error for outcome in outcomes]
    outcomes = run_outcomes(ends, 2, tmp_path / "run", None, saves, timeout_s=60)
    for outcome, end in zip(outcomes, whole, strict=True):
        assert outcome.value[0] == end[0]
