"""``dtrain.ablate``: what each tweak of a training is worth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dtrain.errors import ConfigError
from dtrain.studies import Table, draw, guess_mode
from dtrain.trials.changes import Change, Variant
from dtrain.trials.launcher import Progress, check_script
from dtrain.trials.study import NO_LIMIT_S, Due, StudyRunner, check_asked, compared
from dtrain.trials.study_files import StudyFolder

#: The script that a batch job runs, with a study's folder and a run's number.
RUN_OF_STUDY = Path(__file__).with_name("run_of_study.py")

if TYPE_CHECKING:  # an extra
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Study:
    """What a study shows; ``str()`` of it is all of it, as text.

    Attributes:
        folder: where it is: ``table.md``, ``table.csv``, ``table.json``, ``picture.png``, and a
            ``run_dir`` for each run.
        report: the table as an object, with its notes.
    """

    folder: Path
    report: Table

    @property
    def table(self) -> list[dict[str, Any]]:
        """A dict for each variant, flat: ``pandas.DataFrame(study.table)`` takes them."""
        return self.report.rows

    def plot(self, file: str | Path | None = None) -> "Figure":
        """Returns the picture, a Matplotlib figure; writes it to a file if one is named."""
        figure = draw(self.report)
        if file is not None:
            figure.savefig(file)
        return figure

    def __str__(self) -> str:
        return str(self.report)


def ablate(
    script: str | Path,
    args: Sequence[str] = (),
    *,
    without: Sequence[str] = (),
    set: Sequence[str] = (),
    arg: Sequence[str] = (),
    variants: Mapping[str, Sequence[str]] | None = None,
    each: bool = False,
    pairs: bool = False,
    only: bool = False,
    seeds: int | Sequence[int] = 5,
    metric: str | None = None,
    mode: Literal["min", "max"] | None = None,
    at: str = "final",
    folder: str | Path | None = None,
    jobs: int = 1,
    ranks: int = 1,
    timeout_s: float | None = None,
    retry: bool = False,
    progress: Progress | None = None,
) -> Study:
    """Trains a script as it is and with changes, on several seeds, and compares.

    The script is not changed, and runs from its first line to its last, in processes of its own.
    All variants draw the same data and begin with the same weights for the same seed. What is
    finished is not run again: called again it goes on, and takes in another seed or variant.

    Example::

        study = dtrain.ablate("train.py", without=["EMA", "ClipGradients"], seeds=5)
        print(study)

    Args:
        script: a file that calls ``dtrain.init(seed=...)`` and ``Trainer(...).fit(...)``.
        args: the script's own arguments, in all variants.
        without: leave out these callbacks, by class (``"EMA#2"``: the second of that class); each
            is a variant.
        set: arguments of callbacks or of the optimizer, such as ``"EMA.decay=0.99"``,
            ``"optimizer.lr=1e-3"``; each is a variant.
        arg: more arguments of the script, such as ``"--lr 0.01"``; each is a variant.
        variants: several changes at once, by a name: ``{"no guards": ["without NonFiniteGuard",
            "EMA.decay=0.9", "--lr 0.01"]}``.
        each: leave out every callback of the script in turn.
        pairs: also two at a time of those that are left out.
        only: compare with no callbacks at all (or without those of ``without``), and add one at a
            time.
        seeds: so many, from 0, or these.
        metric: what to compare, such as ``"eval/accuracy"``. By default what the script's
            ``Checkpoint(best=...)`` or ``EarlyStopping`` goes by, else ``eval/loss``, else
            ``train/loss``.
        mode: ``"max"`` if more is better, ``"min"`` if less is; known for usual names.
        at: ``"final"``, ``"best"``, ``"steps"`` or ``"time"`` (where all runs have come to),
            ``"steps=500"``, ``"time=60"`` (seconds), or ``"evaluate"``: what the script's last
            ``Trainer.evaluate`` returned.
        folder: where the study is; ``runs/ablate-SCRIPT`` by default.
        jobs: so many runs at a time, which share this machine's cores and GPUs.
        ranks: of each run.
        timeout_s: how long a run may take, in seconds; for ever if None.
        retry: run again what has failed.
        progress: is told what runs next.

    Returns:
        What was found.

    Raises:
        ConfigError: an argument is off, or a change touches nothing.
        CheckError: the script fails as it is, or never calls ``fit``.

    Ranks: none; it starts them.
    """
    runner = study_runner(script, args, folder, jobs, ranks, timeout_s, retry, progress)
    given = listed_variants(without, set, arg, variants or {})
    with runner.folder.locked(), runner:
        due = runner.plan(
            given,
            listed_seeds(seeds),
            (metric, mode, at),
            each=each,
            pairs=pairs,
            only=only,
        )
        return run_and_show(runner, due)


def run_and_show(runner: StudyRunner, due: Sequence[Due]) -> Study:
    """Runs what is due, and writes what the study shows to its folder."""
    if due:
        runner.run(due)
    return show(runner.folder.path, compared(runner.folder, runner.note))


def show(folder: Path, table: Table) -> Study:
    """Writes a table and its picture to a study's folder."""
    study = Study(folder, table)
    texts = {"table.md": table.markdown(), "table.csv": table.csv(), "table.json": table.json()}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    study.plot(folder / "picture.png")
    return study


def study_runner(
    script: str | Path,
    args: Sequence[str],
    folder: str | Path | None,
    jobs: int,
    ranks: int,
    timeout_s: float | None,
    retry: bool,
    progress: Progress | None,
) -> StudyRunner:
    """Returns a runner of these; ConfigError where one is off."""
    script = Path(script)
    timeout_s = NO_LIMIT_S if timeout_s is None else timeout_s
    check_script(script, timeout_s)
    if missing := [name for name in ("scipy", "matplotlib") if find_spec(name) is None]:
        raise ConfigError(  # now, not after hours of training
            f"a study needs {' and '.join(missing)}: pip install 'dtrain[ablate]'"
        )
    if min(jobs, ranks) < 1:
        raise ConfigError(f"jobs={jobs}, ranks={ranks}: both must be 1 or more")
    where = Path("runs") / f"ablate-{script.stem}" if folder is None else Path(folder).expanduser()
    say = progress or (lambda words: None)
    words = [str(one) for one in args]
    return StudyRunner(
        script, words, StudyFolder(where.absolute()), jobs, ranks, timeout_s, retry, say
    )


def listed_seeds(seeds: int | Sequence[int]) -> list[int]:
    """Returns seeds; ConfigError where they are none."""
    found = list(range(seeds)) if isinstance(seeds, int) else [int(seed) for seed in seeds]
    if not found or min(found) < 0 or max(found) >= 2**32 or len({*found}) < len(found):
        raise ConfigError(
            f"seeds={seeds!r}: a number of seeds, 1 or more, or different ones from 0 to 2**32 - 1"
        )
    return found


def listed_variants(
    without: Sequence[str],
    set: Sequence[str],
    arg: Sequence[str],
    named: Mapping[str, Sequence[str]],
) -> list[Variant]:
    """Returns the variants that are asked for; ConfigError where one cannot be."""
    singles = [Change.parse("without", text) for text in without]
    singles += [Change.parse("set", text) for text in set]
    singles += [Change.parse("arg", text) for text in arg]
    found = [Variant.of([one]) for one in singles]
    for name, changes in named.items():
        if not changes:
            raise ConfigError(f"the variant {name!r} changes nothing: name what it changes")
        found.append(Variant.of(map(Change.read, changes), name))
    return found


def table_of_study(
    folder: Path, metric: str | None = None, mode: str | None = None, at: str | None = None
) -> Study:
    """Returns what the study in a folder shows so far; ConfigError where there is none."""
    files = StudyFolder(folder)
    if (note := files.read()) is None:
        raise ConfigError(f"{folder} holds no study: there is no study.json")
    check_asked(files, note, metric or note.metric, at or note.at)
    if metric is not None and metric != note.metric:
        note.metric, note.mode = metric, mode or guess_mode(metric)
    note.mode, note.at = mode or note.mode, at or note.at
    return Study(folder, compared(files, note))
