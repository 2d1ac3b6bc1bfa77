"""Trains a policy that balances cart-poles, by PPO: a rollout and a fit an iteration.

    python examples/ppo.py                           # one process
    bash launch/torchrun.sh examples/ppo.py          # a rank per GPU, or two on the CPU

Killed and started again, it ends with the same bits: a rollout is drawn by (seed, iteration), with
the *old* policy, which is a frozen part of the model, and so in each checkpoint. All ranks draw the
same rollout: these poles cost little, and what is drawn does not depend on how many ranks there
are. Each rank then trains on its share. tests/ranks/test_ppo.py has the loop that this spares.
"""

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import dtrain
from dtrain.callbacks import Checkpoint, ClipGradients
from dtrain.sinks import JSONLines

DISCOUNT, SMOOTHING, CLIP = 0.98, 0.95, 0.2
DEGREE = math.pi / 180


class CartPoles:
    """Poles on carts, after Barto, Sutton and Anderson (1983); one that falls is set up anew."""

    def __init__(self, count, generator):
        self.shape, self.generator = (count, 4), generator
        self.state = self._set_up()  # [count, 4]: place and speed of the cart, angle and its speed

    def _set_up(self):
        return 0.1 * torch.rand(self.shape, generator=self.generator, dtype=torch.float64) - 0.05

    def step(self, goes_right):
        """Pushes each cart; returns which poles fell."""
        _, speed, angle, spin = self.state.unbind(1)
        push = (torch.where(goes_right, 10.0, -10.0) + 0.05 * spin**2 * angle.sin()) / 1.1
        spins = 9.8 * angle.sin() - angle.cos() * push
        spins = spins / (0.5 * (4 / 3 - 0.1 * angle.cos() ** 2 / 1.1))
        speeds = push - 0.05 * spins * angle.cos() / 1.1
        self.state = self.state + 0.02 * torch.stack([speed, speeds, spin, spins], dim=1)
        fell = (self.state[:, 0].abs() > 2.4) | (self.state[:, 2].abs() > 12 * DEGREE)
        self.state = torch.where(fell[:, None], self._set_up(), self.state)
        return fell


class ActorCritic(nn.Module):
    def __init__(self):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))
        self.critic = nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 1))

    def forward(self, states):
        """Returns the logit of a push to the right, and what is expected to come."""
        return self.actor(states).squeeze(-1), self.critic(states).squeeze(-1)


def make_networks():
    networks = nn.ModuleDict({"new": ActorCritic(), "old": ActorCritic()}).double()
    networks["old"].requires_grad_(False)
    return networks


def make_optimizer(networks):
    return torch.optim.Adam(networks["new"].parameters(), lr=2e-3)


@torch.no_grad()
def collect(policy, seed, iteration, poles=32, steps=128):
    """Returns a rollout, as a dataset, and for how many steps a pole stood, on average."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    carts = CartPoles(poles, generator)
    device = next(policy.parameters()).device
    states, pushes, falls, values = [], [], [], []
    for _ in range(steps + 1):  # of the last one, only the value counts
        logit, value = (out.cpu() for out in policy(carts.state.to(device)))
        goes_right = torch.rand(poles, generator=generator, dtype=torch.float64) < logit.sigmoid()
        states.append(carts.state)
        pushes.append(goes_right)
        values.append(value)
        falls.append(carts.step(goes_right))
    advantage, advantages = torch.zeros_like(values[0]), []
    for step in reversed(range(steps)):  # a reward of 1 for each step that a pole stands
        stands = 1.0 - falls[step].double()
        surprise = stands + DISCOUNT * stands * values[step + 1] - values[step]
        advantage = surprise + DISCOUNT * SMOOTHING * stands * advantage
        advantages.insert(0, advantage)
    gains = torch.cat(advantages)
    returns = gains + torch.cat(values[:-1])
    # Over the whole rollout: of a batch, each rank has but a part.
    gains = (gains - gains.mean()) / gains.std()
    rollout = TensorDataset(torch.cat(states[:-1]), torch.cat(pushes[:-1]), gains, returns)
    fallen = int(torch.stack(falls[:-1]).sum())
    return rollout, poles * steps / (poles + fallen)


def log_prob(logit, goes_right):
    return F.logsigmoid(torch.where(goes_right, logit, -logit))


def loss_fn(networks, batch):
    states, goes_right, gains, returns = batch
    logit, value = networks["new"](states)
    ratio = (log_prob(logit, goes_right) - log_prob(networks["old"](states)[0], goes_right)).exp()
    bounded = ratio.clamp(1 - CLIP, 1 + CLIP)
    gain = torch.minimum(ratio * gains, bounded * gains).mean()
    entropy = F.binary_cross_entropy_with_logits(logit, logit.sigmoid())
    error = F.mse_loss(value, returns)
    metrics = {"gain": gain, "entropy": entropy, "critic": error}
    return dtrain.Loss(0.01 * error - gain - 0.01 * entropy, metrics=metrics)


def train(trainer, *, iterations, seed=0, epochs=4, batch_size=256, tell=print, **how):
    """PPO: what is done is left out, and what was interrupted goes on."""
    networks, begun = trainer.model, trainer.restore()
    for iteration in range(begun.phase, iterations):
        # Within an iteration, the old policy is what the checkpoint holds.
        if iteration > begun.phase or begun.of_phase().step == 0:
            networks["old"].load_state_dict(networks["new"].state_dict())
        rollout, stood = collect(networks["old"], seed, iteration, **how)
        tell(f"iteration {iteration}: a pole stands for {stood:.1f} steps")
        result = trainer.fit(
            rollout, batch_size=batch_size, epochs=epochs, name=f"iteration {iteration}"
        )
        if result.preempted:
            break


def main():
    args = parse_args()
    dtrain.init(seed=args.seed)
    networks = make_networks()
    trainer = dtrain.Trainer(
        networks,
        make_optimizer(networks),
        loss_fn,
        # Told to leave, a run is saved at once, too; killed, it takes up to an iteration again.
        callbacks=[ClipGradients(0.5), Checkpoint(every_fits=1, keep=2)],
        sinks=[JSONLines()],
        run_dir=args.run_dir,
    )

    def tell(text):
        dtrain.on_main("tell", lambda: print(text, flush=True))

    train(
        trainer,
        iterations=args.iterations,
        seed=args.seed,
        epochs=args.epochs,
        batch_size=args.batch_size,
        tell=tell,
    )


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--run-dir", default="runs/ppo")
    parser.add_argument("--iterations", type=int, default=30)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
