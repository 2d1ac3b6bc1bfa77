"""What a check and a drill are asked for.

Nothing here imports torch before the Launcher has started a process that needs as long for it.
"""

from collections.abc import Sequence
from pathlib import Path

from dtrain.errors import ConfigError
from dtrain.trials.launcher import Launcher, Progress, check_script
from dtrain.trials.report import Drilled, Equivalence

#: What makes numbers depend on the number of ranks, and can be taken out of a script's training.
#: ``--allow`` takes these, and takes them out; experiments do the same.
SWITCHES = {
    "dropout": "dropout is switched off",
    "batchnorm": "BatchNorm runs in eval mode",
    "augmentation": "each sample's random augmentation is seeded by its index",
    "mixup": "Mixup is left out",
}


def check_equivalence(
    script: str | Path,
    args: Sequence[str] = (),
    *,
    ranks: int = 2,
    micro_batches: Sequence[int] = (1, 2),
    steps: int = 4,
    timeout_s: float = 300.0,
    allow: Sequence[str] = (),
    progress: Progress | None = None,
) -> Equivalence:
    """Trains a few steps of a script on 1 and on several ranks, and compares all numbers.

    The script runs as it is, in processes of its own, up to the end of its first ``fit``. There
    it takes ``steps`` steps in float64, without checkpoints, sinks, evaluation and mixed
    precision, on every combination of ranks and micro-batches. Where numbers part from those of
    one rank with one micro-batch, experiments look for the cause.

    Example::

        found = dtrain.check_equivalence("train.py", ["--size", "tiny"])
        assert found.passed, str(found)

    Args:
        script: a file that calls ``Trainer(...).fit(...)``.
        args: the script's own arguments.
        ranks: compare one rank with so many: on this machine's GPUs if there is one for each,
            else on its CPU.
        micro_batches: compare so many micro-batches a rank.
        steps: global steps of each run.
        timeout_s: how long a run may take, in seconds.
        allow: what is taken out of all runs, so that the rest can be compared: ``"dropout"``,
            ``"batchnorm"``, ``"augmentation"``, ``"mixup"``.
        progress: is told what runs next.

    Returns:
        What was found; ``str()`` of it is a report.

    Raises:
        ConfigError: an argument is off.
        CheckError: the script failed, took too long, or never called ``fit``.

    Ranks: none; it starts them.
    """
    script = Path(script)
    check_script(script, timeout_s)
    if min(ranks, steps, *micro_batches) < 1:
        given = f"ranks={ranks}, steps={steps}, micro_batches={list(micro_batches)}"
        raise ConfigError(f"{given}: all must be 1 or more")
    if ranks == 1 and not any(micros > 1 for micros in micro_batches):
        raise ConfigError(
            "nothing to compare: with one rank and one micro-batch there is the truth only. Ask "
            "for ranks=2, or micro_batches=(1, 2)"
        )
    for name in allow:
        if name not in SWITCHES:
            raise ConfigError(f"allow={name!r}: choose from {', '.join(SWITCHES)}")
    with Launcher(most_ranks=ranks, progress=progress) as launcher:
        from dtrain.trials.check import Check

        check = Check(launcher, script, args, ranks, steps, timeout_s, tuple(allow))
        return check.run(micro_batches)


def drill_script(
    script: str | Path,
    args: Sequence[str] = (),  # the script's own
    *,
    ranks: int = 2,
    kills: int = 3,  # in a step; half as many more fall on a save, and one rank is preempted
    steps: int = 20,  # global steps of each run, at most
    seed: int = 0,  # of the steps, ranks and moments of all that is done
    timeout_s: float = 300.0,  # that one start may take
    other_ranks: int | None = None,  # in one more trial, go on with so many
    progress: Progress | None = None,  # is told what runs next
) -> Drilled:
    """Kills a script's training again and again, and compares how it ends.

    The script runs as it is, in processes of its own, up to the end of its first ``fit``. Raises
    ConfigError where an argument is off, CheckError where the script cannot be drilled.
    """
    script = Path(script)
    check_script(script, timeout_s)
    if min(ranks, kills) < 1 or (other_ranks is not None and other_ranks < 1):
        other = "" if other_ranks is None else f", other_ranks={other_ranks}"
        raise ConfigError(f"ranks={ranks}, kills={kills}{other}: all must be 1 or more")
    if steps < 3:
        raise ConfigError(f"steps={steps}: must be 3 or more, to save, be killed and go on")
    if other_ranks == ranks:
        raise ConfigError(
            f"other_ranks={other_ranks} is the number of ranks of all other trials: ask for another"
        )
    most = max(ranks, other_ranks or 1)
    with Launcher(most_ranks=most, command="drill", progress=progress) as launcher:
        from dtrain.trials.drill import Drill

        one = Drill(launcher, script, args, ranks, steps, seed, timeout_s)
        return one.run(kills=kills, other_ranks=other_ranks)
