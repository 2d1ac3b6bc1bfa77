"""From what runs recorded to why their numbers part."""

import math
from collections.abc import Iterator, Sequence

import torch

from dtrain.trials.check_compare import Comparison, Tolerance
from dtrain.trials.check_record import Examined, Record, Results
from dtrain.trials.check_report import Cause

_SWITCHED = {
    "dropout": (
        "Dropout is on. Each rank draws the masks of its own samples, so the masks depend on the "
        "number of ranks and micro-batches.",
        "nothing: this is expected, and harmless. To check all the rest, switch it off here with "
        "--allow dropout.",
    ),
    "batchnorm": (
        "BatchNorm normalises with the statistics of a micro-batch on one rank, so the numbers "
        "depend on how many samples that has.",
        "use GroupNorm or LayerNorm; or, on GPUs and without accumulation, "
        "strategy=DDP(sync_batchnorm=True). If you accept it, check the rest with "
        "--allow batchnorm.",
    ),
    "augmentation": (
        "The dataset draws from the global random streams, and each rank has streams of its own: "
        "so what a sample looks like depends on the rank it comes to.",
        "nothing, if it is augmentation that may be random. To make it the same on any number of "
        "ranks, draw from a generator seeded by the sample's index. To check the rest, use "
        "--allow augmentation.",
    ),
    "mixup": (
        "Mixup seeks partners within a rank's micro-batch, so who is mixed with whom depends on "
        "ranks and micro-batches.",
        "nothing: this is expected. To check all the rest, leave it out with --allow mixup.",
    ),
}


def switchable(suspects: Sequence[str], equal_without: bool | None) -> list[Cause]:
    """Returns causes that an experiment has switched off.

    Args:
        suspects: names from :data:`~dtrain.trials.check_trial.SWITCHES`, all switched off at once.
        equal_without: the numbers were equal then; None where it could not be tried.
    """
    them = "it" if len(suspects) == 1 else "all of " + ", ".join(suspects)
    if equal_without is None:
        tried = f"Whether the numbers are equal without {them} could not be tried."
    elif equal_without:
        tried = f"Tried: without {them}, the numbers are equal."
    else:
        tried = f"Tried: without {them}, the numbers still part: there is another cause as well."
    return [Cause(name, f"{_SWITCHED[name][0]} {tried}", _SWITCHED[name][1]) for name in suspects]


def sure(
    truth: Results, run: Results, twins: Results | None, found: Comparison, tolerance: Tolerance
) -> Iterator[Cause]:
    """Yields what makes numbers part wherever it is seen.

    Args:
        truth: one rank with one micro-batch, examined.
        run: one that parts from it.
        twins: ranks that were all given the same samples and random streams.
        found: in what ``run`` parts.
        tolerance: of the comparison.
    """
    examined = truth.main.examined or Examined()
    if found.strays:
        which = ", ".join(str(rank) for rank in found.strays)
        yield Cause(
            "ranks that drift apart",
            f"On {found.title}, the parameters of rank {which} are no longer those of rank 0. All "
            "ranks get the same gradients, so something changes gradients, parameters or the "
            "optimizer otherwise on each rank.",
            "look for the rank, or random numbers, in on_grads_ready, on_step_end and the "
            "optimizer; ctx.shared_rng is equal on all ranks.",
        )
    if not examined.draws and (examined.mean_gap or 0.0) > tolerance.loss:
        yield Cause(
            "ragged mean",
            examined.mean_evidence,
            "return the weight that the mean is over: dtrain.Loss.from_sum(total, weight=count), "
            "with the count of tokens or pixels that were not masked; or dtrain.Loss(mean, "
            "weight=count). If instead samples see one another (in-batch negatives, statistics or "
            "the size of the batch), the numbers cannot be the same on other ranks.",
        )
    if twins is not None:
        yield from _rank_in_data(twins)
        yield from _rank_in_loss(twins, examined.draws)
    if other := other_start(truth, run):
        count = len(truth.tensors("initial"))
        yield Cause(
            "other initial parameters",
            f"Before the first step, {len(other)} of {count} parameters on {found.title} are not "
            f"those on one rank: {_some(other, 3)}.",
            "call dtrain.init(seed=...) before the model is made, and seed nothing by the rank or "
            "the number of ranks.",
        )
    if settings := _other_settings(truth.main, run.main):
        step, values = settings
        yield Cause(
            "other settings of the optimizer",
            f"In step {step + 1}, on one rank and on {found.title}: {values}.",
            "do not scale by the number of ranks: batch_size is the global batch, so the learning "
            "rate and the schedule are the same on any number of them.",
        )


def possible(truth: Record) -> Iterator[Cause]:
    """Yields what only may be a cause, or follows from a sure one; the likeliest first."""
    examined = truth.examined or Examined()
    if examined.data_wanders:
        yield Cause(
            "a dataset with random numbers of its own",
            "Fetched twice, with the same random streams, a sample came out differently: the "
            "dataset has a generator of its own (or none that is seeded).",
            "draw from a generator seeded by the sample's index (and the epoch, if each is to "
            "differ).",
        )
    if examined.draws:
        yield Cause(
            "a loss function that draws random numbers",
            f"It draws: {examined.draws}. What a sample gets depends on which samples are drawn "
            "for before it, and so on ranks and micro-batches.",
            "nothing, if the noise may be any. To make it the same on any number of ranks, draw it "
            "in the dataset, from a generator seeded by the sample's index.",
        )
    if truth.moving_buffers:
        yield Cause(
            "state that the model keeps",
            f"Training changes these buffers: {_some(truth.moving_buffers, 5)}. If each forward "
            "changes them (as in spectral norm), the number of micro-batches does.",
            "change such state once a step, in a callback's on_step_end, and alike on all ranks; "
            "or keep none.",
        )


def not_repeatable(again: Comparison) -> Cause:
    """Returns the cause where the truth is not the truth a second time."""
    return Cause(
        "a training that does not repeat",
        f"The same run once more, on one rank, gave other numbers (loss by {again.loss_gap:.1e}, "
        f"{again.worst} by {again.worst_gap:.1e}). Something in it is not seeded, or takes the "
        "time, or runs in another order each time.",
        "call dtrain.init(seed=...) first, and seed every generator of your own.",
    )


UNKNOWN = Cause(
    "not found",
    "It is none of: dropout, BatchNorm, Mixup, random augmentation, a ragged mean, random "
    "numbers in the loss function, data or a loss that depend on the rank, other initial "
    "parameters, other settings of the optimizer; and the run repeats itself.",
    "look at the first step that parts, and at the tensors above. Suspects: a callback that "
    "draws random numbers in on_batch, or changes gradients or parameters by what one rank "
    "sees, state that the model keeps between micro-batches, and a loss function that scales "
    "by what it sees in its own batch only.",
)


def other_start(truth: Results, run: Results) -> list[str]:
    """Returns the parameters that were not equal before the first step."""
    mine, theirs = truth.tensors("initial"), run.tensors("initial")
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


def _rank_in_data(twins: Results) -> Iterator[Cause]:
    main = twins.main
    for rank, other in enumerate(twins.ranks[1:], start=1):
        step = _first_difference(main.samples, other.samples)
        if step is not None:
            count = len({*main.samples[step]} - {*other.samples[step]})
            yield Cause(
                "data that depend on the rank",
                f"Asked for the same {len(main.samples[step])} samples, with the same random "
                f"streams, rank 0 and rank {rank} got different values for {count} of them (in "
                f"step {step + 1}).",
                "make the dataset the same on all ranks: no rank (nor time, nor process number) "
                "in its seeds, shuffling or files. dtrain gives each rank its own samples by "
                "itself.",
            )
            return


def _rank_in_loss(twins: Results, draws: str) -> Iterator[Cause]:
    main = twins.main
    for rank, other in enumerate(twins.ranks[1:], start=1):
        # Where ranks drift apart, only the first loss is of equal parameters.
        valid = None if main.own_parameters == other.own_parameters else 1
        for what, mine, theirs in (
            ("a mean", main.own_losses[:valid], other.own_losses[:valid]),
            ("a weight", main.own_weights, other.own_weights),
        ):
            place = _first_difference(mine, theirs)
            if place is not None:
                yield Cause(
                    "a loss function that depends on the rank",
                    "On the same samples, with the same parameters and random streams, it returned "
                    f"{what} of {mine[place]:.6g} on rank 0 and {theirs[place]:.6g} on rank {rank}."
                    + (f" It draws random numbers: {draws}." if draws else ""),
                    "seed no generator by the rank, and do not ask for the rank in the loss "
                    "function. For noise that is the same on any number of ranks, seed a generator "
                    "by the sample's index.",
                )
                return


def _other_settings(truth: Record, run: Record) -> tuple[int, str] | None:
    """Returns the first step in which the optimizer has other numbers, and which."""
    for step, (mine, theirs) in enumerate(zip(truth.settings, run.settings, strict=False)):
        for a, b in zip(mine, theirs, strict=False):
            names = [name for name in a if name in b and a[name] != b[name]]
            if names:
                return step, ", ".join(f"{name} is {a[name]} and {b[name]}" for name in names)
    return None


def _some(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + ", ..." * (len(names) > most)


def _first_difference(mine: Sequence[object], theirs: Sequence[object]) -> int | None:
    for place, (a, b) in enumerate(zip(mine, theirs, strict=False)):
        if isinstance(a, float) and isinstance(b, float):
            if not math.isclose(a, b, rel_tol=1e-9) and not (math.isnan(a) and math.isnan(b)):
                return place
        elif a != b:
            return place
    return None
