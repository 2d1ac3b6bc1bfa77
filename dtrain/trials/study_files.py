"""The folder of a study: what it is of, and what each of its runs came to. No torch here.

study.json                     the script, its arguments, variants, seeds, what is compared
without-EMA/seed-0/            a run's run_dir: metrics.jsonl, checkpoints, whatever it writes
without-EMA/seed-0/run.json    what became of it
without-EMA/seed-0/rank-0.txt  what its first rank printed
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dtrain.errors import ConfigError
from dtrain.studies import Run, read_rows
from dtrain.trials.changes import Variant

State = Literal["finished", "failed", "unfinished"]
FORMAT = 1
_STUDY, _RUN = "study.json", "run.json"


@dataclass(frozen=True, slots=True)
class RunNote:
    """What became of one run so far: ``run.json``."""

    variant: str
    seed: int
    state: State = "unfinished"
    changes: list[str] = field(default_factory=list)  # in words
    error: str = ""  # the first line of what it failed with
    fits: int = 0  # that were begun
    place: str = ""  # of the files of the Trainer whose fit was the last, in the run's folder
    start: str = ""  # digest of the weights that the first fit began with
    steps: int = 0  # global steps taken, at the end of the last fit
    stop_reason: str = ""
    seconds: float = 0.0  # from the script's first line to its last, of the last start
    step_s: float | None = None  # median seconds of a step, of the last start
    memory: int | None = None  # bytes, the most of rank 0: of its GPU, else of its process
    left: bool = False  # it was told to leave, and goes on another time
    evaluated: dict[str, float] = field(default_factory=dict)  # by the last Trainer.evaluate
    notes: list[str] = field(default_factory=list)


@dataclass(slots=True)
class StudyNote:
    """What a study is of: ``study.json``."""

    script: str
    args: list[str]
    digest: str  # of the script's text
    threads: int  # of a rank: other numbers of them may give other last bits
    metric: str = ""
    mode: str = ""
    at: str = "final"
    callbacks: list[str] = field(default_factory=list)  # that the script has
    variants: list[Variant] = field(default_factory=list)  # the first is compared with
    runs: list[tuple[str, int]] = field(default_factory=list)  # variant and seed; only ever longer
    jobs: list[str] = field(default_factory=list)  # SLURM's, that were submitted
    format: int = FORMAT


class StudyFolder:
    """A study's folder. Ranks: none, but for :meth:`write_run`, which is rank 0's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run_dir(self, variant: str, seed: int) -> Path:
        """Returns where a run's files are."""
        return self.path / slug(variant) / f"seed-{seed}"

    def read(self) -> StudyNote | None:
        """Returns what the study is of; None where there is none. ConfigError if it is damaged."""
        file = self.path / _STUDY
        try:
            facts = json.loads(file.read_bytes())
            facts["variants"] = [Variant.from_json(one) for one in facts["variants"]]
            facts["runs"] = [(str(variant), int(seed)) for variant, seed in facts["runs"]]
            return StudyNote(**facts)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}): move it away, or choose another --folder"
            ) from error

    def write(self, note: StudyNote) -> None:
        """Writes what the study is of. ConfigError where the folder cannot be written."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / _STUDY, asdict(note))
        except OSError as error:
            raise ConfigError(
                f"the study's folder {self.path} cannot be written: {error}"
            ) from None

    def read_run(self, variant: str, seed: int) -> RunNote:
        """Returns what became of a run; where nothing is known of it, it is unfinished."""
        file = self.run_dir(variant, seed) / _RUN
        try:
            return RunNote(**json.loads(file.read_bytes()))
        except FileNotFoundError:
            return RunNote(variant, seed)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigError(
                f"{file} cannot be read ({error}), so whether that run is done cannot be known. "
                f"Delete {file.parent} to have it run again"
            ) from error

    def prepare_run(self, variant: str, seed: int) -> Path:
        """Returns a run's folder, ready for a start, which goes on with what is there.

        Not where a start could not: the run had come to its end, or to a second ``fit``, and its
        script had not. Then its files are deleted.
        """
        folder, note = self.run_dir(variant, seed), self.read_run(variant, seed)
        try:
            status = json.loads((folder / "status.json").read_bytes()).get("status")
        except (OSError, ValueError, AttributeError):
            status = ""
        if note.fits > 1 or status == "finished":
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def runs(self, which: Iterable[tuple[str, int]]) -> list[Run]:
        """Returns runs, with their figures."""
        found = []
        for variant, seed in which:
            run, folder = self.read_run(variant, seed), self.run_dir(variant, seed)
            place = folder / run.place
            rows = read_rows(place) if place.is_dir() else []
            found.append(
                Run(
                    variant=variant,
                    seed=seed,
                    state=run.state,
                    rows=rows,
                    error=run.error,
                    step_s=run.step_s,
                    memory=run.memory,
                    start=run.start,
                    evaluated=run.evaluated,
                    path=folder,
                )
            )
        return found

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps the folder for one command at a time; ConfigError where another has it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise ConfigError(
                f"the study's folder {self.path} cannot be written: {error}"
            ) from None
        try:
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ConfigError(
                        f"another dtrain ablate is at work in {self.path}: wait for it, or choose "
                        "another --folder"
                    ) from None
                # A file system without locks: nothing is known, and nothing refused.
            yield
        finally:
            os.close(handle)


def start_of(folder: Path) -> str:
    """Returns the digest of the weights that an earlier start of a run began with, if there is."""
    try:
        return str(json.loads((folder / _RUN).read_bytes())["start"])
    except FileNotFoundError:
        return ""


def write_run(folder: Path, note: RunNote) -> None:
    """Writes what became of a run, of whose folder the script may have left nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _RUN, asdict(note))


def fail_run(folder: Path, note: RunNote, error: str) -> None:
    """Notes that a run has failed, where it could not do so itself."""
    write_run(folder, replace(note, state="failed", error=error))


def write_json(file: Path, facts: dict[str, Any]) -> None:
    """Replaces a file by these facts, in one piece, down to the disk."""
    aside = file.with_name(f".{file.name}.writing")
    with aside.open("w", encoding="utf-8") as new:
        json.dump(facts, new, indent=1, ensure_ascii=False)
        new.write("\n")
        new.flush()
        os.fsync(new.fileno())
    aside.replace(file)


def digest_of_file(file: Path) -> str:
    """Returns a digest of a script's text."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def slug(name: str) -> str:
    """Returns a name of a folder for a variant; no two variants have the same."""
    plain = re.sub(r"[^A-Za-z0-9.=+-]+", "-", name).strip("-.")[:60]
    if "-" not in name and plain == name.replace(" ", "-"):
        return plain
    return f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
