"""From what runs recorded to why their numbers part."""

import math
from collections.abc import Iterator, Sequence

import torch

from dtrain.trials.check_compare import Comparison, Record, Results, Tolerance
from dtrain.trials.report import Cause

#: What is seen of each cause, and what to do.
_WORDS = {
    "dropout": (
        "Dropout is on. Each rank draws the masks of its own samples, so the masks depend on the "
        "number of ranks and micro-batches. {tried}",
        "nothing: this is expected, and harmless. To check all the rest, switch it off here with "
        "--allow dropout.",
    ),
    "batchnorm": (
        "BatchNorm normalises with the statistics of a micro-batch on one rank, so the numbers "
        "depend on how many samples that has. {tried}",
        "use GroupNorm or LayerNorm; or, on GPUs and without accumulation, "
        "strategy=DDP(sync_batchnorm=True). If you accept it, check the rest with "
        "--allow batchnorm.",
    ),
    "augmentation": (
        "The dataset draws from the global random streams, and each rank has streams of its own: "
        "so what a sample looks like depends on the rank it comes to. {tried}",
        "nothing, if it is augmentation that may be random. To make it the same on any number of "
        "ranks, draw from a generator seeded by the sample's index. To check the rest, use "
        "--allow augmentation.",
    ),
    "mixup": (
        "Mixup seeks partners within a rank's micro-batch, so who is mixed with whom depends on "
        "ranks and micro-batches. {tried}",
        "nothing: this is expected. To check all the rest, leave it out with --allow mixup.",
    ),
    "ranks that drift apart": (
        "On {run}, the parameters of rank {strays} are no longer those of rank 0. All ranks get "
        "the same gradients, so something changes gradients, parameters or the optimizer otherwise "
        "on each rank.",
        "look for the rank, or random numbers, in on_grads_ready, on_step_end and the optimizer; "
        "ctx.shared_rng is equal on all ranks.",
    ),
    "ragged mean": (
        "{evidence}",
        "return the weight that the mean is over: dtrain.Loss.from_sum(total, weight=count), with "
        "the count of tokens or pixels that were not masked; or dtrain.Loss(mean, weight=count). "
        "If instead samples see one another (in-batch negatives, statistics or the size of the "
        "batch), the numbers cannot be the same on other ranks.",
    ),
    "padding": (
        "{evidence} Each part was collated by itself, and so padded to its own longest sample: the "
        "loss depends on the padding, and that on who shares a micro-batch.",
        "leave the padding out: of attention and pooling by a mask, of the loss by its weight, "
        "dtrain.Loss.from_sum(total, weight=count). Or let the collate function pad to a fixed "
        "length.",
    ),
    "data that depend on the rank": (
        "Asked for the same {asked} samples, with the same random streams, rank 0 and rank {rank} "
        "got different values for {count} of them (in step {step}).",
        "make the dataset the same on all ranks: no rank (nor time, nor process number) in its "
        "seeds, shuffling or files. dtrain gives each rank its own samples by itself.",
    ),
    "a loss function that depends on the rank": (
        "On the same samples, with the same parameters and random streams, it returned {what} of "
        "{mine:.6g} on rank 0 and {theirs:.6g} on rank {rank}.{draws}",
        "seed no generator by the rank, and do not ask for the rank in the loss function. For "
        "noise that is the same on any number of ranks, seed a generator by the sample's index.",
    ),
    "other initial parameters": (
        "Before the first step, {other} of {count} parameters on {run} are not those on one rank: "
        "{names}.",
        "call dtrain.init(seed=...) before the model is made, and seed nothing by the rank or the "
        "number of ranks.",
    ),
    "other settings of the optimizer": (
        "In step {step}, on one rank and on {run}: {values}.",
        "do not scale by the number of ranks: batch_size is the global batch, so the learning rate "
        "and the schedule are the same on any number of them.",
    ),
    "a dataset with random numbers of its own": (
        "Fetched twice, with the same random streams, a sample came out differently: the dataset "
        "has a generator of its own (or none that is seeded).",
        "draw from a generator seeded by the sample's index (and the epoch, if each is to differ).",
    ),
    "a loss function that draws random numbers": (
        "It draws: {draws}. What a sample gets depends on which samples are drawn for before it, "
        "and so on ranks and micro-batches.",
        "nothing, if the noise may be any. To make it the same on any number of ranks, draw it in "
        "the dataset, from a generator seeded by the sample's index.",
    ),
    "state that the model keeps": (
        "Training changes these buffers: {names}. If each forward changes them (as in spectral "
        "norm), the number of micro-batches does.",
        "change such state once a step, in a callback's on_step_end, and alike on all ranks; or "
        "keep none.",
    ),
    "a training that does not repeat": (
        "The same run once more, on one rank, gave other numbers (loss by {loss:.1e}, {worst} by "
        "{gap:.1e}). Something in it is not seeded, or takes the time, or runs in another order "
        "each time.",
        "call dtrain.init(seed=...) first, and seed every generator of your own.",
    ),
    "not found": (
        "It is none of: dropout, BatchNorm, Mixup, random augmentation, a ragged mean, padding, "
        "random numbers in the loss function, data or a loss that depend on the rank, other "
        "initial parameters, other settings of the optimizer; and the run repeats itself.",
        "look at the first step that parts, and at the tensors above. Suspects: a callback that "
        "draws random numbers in on_batch, or changes gradients or parameters by what one rank "
        "sees, state that the model keeps between micro-batches, and a loss function that scales "
        "by what it sees in its own batch only.",
    ),
}


def cause(name: str, **seen: object) -> Cause:
    """Returns a cause in words, with the values that were seen."""
    evidence, remedy = _WORDS[name]
    return Cause(name, evidence.format(**seen), remedy)


def switchable(suspects: Sequence[str], equal_without: bool | None) -> list[Cause]:
    """Returns causes that were all switched off at once, and whether numbers were equal then."""
    them = "it" if len(suspects) == 1 else "all of " + ", ".join(suspects)
    if equal_without is None:
        tried = f"Whether the numbers are equal without {them} could not be tried."
    elif equal_without:
        tried = f"Tried: without {them}, the numbers are equal."
    else:
        tried = f"Tried: without {them}, the numbers still part: there is another cause as well."
    return [cause(name, tried=tried) for name in suspects]


def sure(
    truth: Results, run: Results, twins: Results | None, found: Comparison, tolerance: Tolerance
) -> Iterator[Cause]:
    """Yields what makes numbers part wherever it is seen.

    ``run`` parts from the truth as ``found`` says; ``twins`` are ranks that were all given the
    same samples and random streams.
    """
    if found.strays:
        strays = ", ".join(map(str, found.strays))
        yield cause("ranks that drift apart", run=found.title, strays=strays)
    if not truth.main.draws and (truth.main.mean_gap or 0.0) > tolerance.loss:
        yield cause("ragged mean", evidence=truth.main.mean_evidence)
    elif not truth.main.draws and (truth.main.padding_gap or 0.0) > tolerance.loss:
        yield cause("padding", evidence=truth.main.padding_evidence)
    if twins is not None:
        yield from _rank_dependent(twins, truth.main.draws)
    if other := other_start(truth, run):
        values = {"other": len(other), "count": len(truth.tensors("initial")), "run": found.title}
        yield cause("other initial parameters", **values, names=_some(other, 3))
    steps = enumerate(zip(truth.main.settings, run.main.settings, strict=False), start=1)
    groups = ((step, a, b) for step, two in steps for a, b in zip(*two, strict=False))
    for step, a, b in groups:
        if names := [name for name in a if name in b and a[name] != b[name]]:
            both = ", ".join(f"{name} is {a[name]} and {b[name]}" for name in names)
            settings = "other settings of the optimizer"
            yield cause(settings, step=step, run=found.title, values=both)
            return


def possible(truth: Record) -> Iterator[Cause]:
    """Yields what only may be a cause, or follows from a sure one; the likeliest first."""
    if truth.data_wanders:
        yield cause("a dataset with random numbers of its own")
    if truth.draws:
        yield cause("a loss function that draws random numbers", draws=truth.draws)
    if truth.moving_buffers:
        yield cause("state that the model keeps", names=_some(truth.moving_buffers, 5))


def other_start(truth: Results, run: Results) -> list[str]:
    """Returns the parameters that were not equal before the first step."""
    mine, theirs = truth.tensors("initial"), run.tensors("initial")
    return [name for name in mine if not torch.equal(mine[name], theirs[name])]


def _rank_dependent(twins: Results, draws: str) -> list[Cause]:
    """Returns what ranks with the same samples and random streams do otherwise, each once."""
    main = twins.main
    found: dict[str, Cause] = {}
    for rank, other in enumerate(twins.ranks[1:], start=1):
        name = "data that depend on the rank"
        if (at := _first_difference(main.samples, other.samples)) is not None:
            asked = main.samples[at]
            count = len({*asked} - {*other.samples[at]})
            seen = {"asked": len(asked), "rank": rank, "count": count, "step": at + 1}
            found.setdefault(name, cause(name, **seen))
        name = "a loss function that depends on the rank"
        # Where ranks drift apart, only the first loss is of equal parameters.
        valid = None if main.own_parameters == other.own_parameters else 1
        for what, mine, theirs in (
            ("a mean", main.own_losses[:valid], other.own_losses[:valid]),
            ("a weight", main.own_weights, other.own_weights),
        ):
            if (at := _first_difference(mine, theirs)) is not None:
                drawn = f" It draws random numbers: {draws}." if draws else ""
                values = {"what": what, "mine": mine[at], "theirs": theirs[at], "draws": drawn}
                found.setdefault(name, cause(name, rank=rank, **values))
    return [found[name] for name in _WORDS if name in found]


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
