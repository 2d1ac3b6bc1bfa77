"""What the variants of a study change in a script's training. Nothing here imports torch."""

import ast
import re
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Literal

from dtrain.errors import ConfigError

Kind = Literal["without", "set", "arg"]
#: What a study compares with: the script as it is, or (``only``) without any of the callbacks.
BASE, NONE = "base", "none"
_WORDS = {"true": True, "false": False, "none": None, "null": None}


@dataclass(frozen=True, slots=True)
class Change:
    """One thing that is otherwise than the script has it."""

    kind: Kind
    what: str  # "EMA" or "EMA#2" (its second one); "EMA.decay", "optimizer.lr"; "--lr 0.01"
    text: str = ""  # of ``set``: the value, as it was given

    def __str__(self) -> str:
        if self.kind == "set":
            return f"{self.what}={self.text}"
        return f"without {self.what}" if self.kind == "without" else self.what

    @classmethod
    def parse(cls, kind: Kind, text: str) -> "Change":
        """Takes what follows ``--without``, ``--set`` or ``--arg``; ConfigError if it is none."""
        text = text.strip()
        if kind == "set":
            what, equals, value = text.partition("=")
            if not (equals and re.fullmatch(r"\w+(#[1-9]\d*)?\.\w+", what.strip())):
                raise ConfigError(
                    f"--set {text}: write an argument of a callback or of the optimizer and its "
                    "value, such as EMA.decay=0.99 or optimizer.lr=1e-3"
                )
            return cls(kind, what.strip(), value.strip())
        if kind == "without" and not re.fullmatch(r"[^\s#=,]+(#[1-9]\d*)?", text):
            raise ConfigError(
                f"--without {text or repr(text)}: write a callback's class, such as EMA, or EMA#2 "
                "for the second of that class; another one takes a --without of its own"
            )
        if kind == "arg":
            try:
                words = shlex.split(text)
            except ValueError as error:
                raise ConfigError(f"--arg {text!r}: {error}") from None
            if not words:
                raise ConfigError('--arg: write arguments of the script, such as --arg="--lr 0.01"')
        return cls(kind, text)

    @classmethod
    def read(cls, text: str) -> "Change":
        """Takes one as ``str`` writes it: ``without EMA``, ``EMA.decay=0.9``, ``--lr 0.01``."""
        if text.startswith("without "):
            return cls.parse("without", text.removeprefix("without "))
        return cls.parse("arg" if text.startswith("-") else "set", text)

    @property
    def value(self) -> Any:
        """What to set: a Python literal, true, false or none in any case, else the text itself."""
        if self.text.lower() in _WORDS:
            return _WORDS[self.text.lower()]
        try:
            return ast.literal_eval(self.text)
        except (ValueError, SyntaxError):
            return self.text


@dataclass(frozen=True, slots=True)
class Variant:
    """A training to compare: the script with some changes."""

    name: str
    changes: tuple[Change, ...] = ()

    @classmethod
    def of(cls, changes: Iterable[Change], name: str = "") -> "Variant":
        """Returns the variant of these changes, by their own names unless one is given."""
        changes = tuple(changes)
        return cls(name or ", ".join(map(str, changes)), changes)

    @classmethod
    def from_json(cls, facts: dict[str, Any]) -> "Variant":
        """Returns what ``asdict`` made a dict of."""
        return cls(facts["name"], tuple(Change(**one) for one in facts["changes"]))

    @property
    def arguments(self) -> list[str]:
        """What is added to the script's own arguments."""
        return [w for one in self.changes if one.kind == "arg" for w in shlex.split(one.what)]

    @property
    def overrides(self) -> list[dict[str, Any]]:
        """What changes in the Trainer, as JSON values."""
        return [asdict(one) for one in self.changes if one.kind != "arg"]


def numbered(classes: Sequence[str]) -> list[str]:
    """Returns names for callbacks of these classes: ``EMA``, or ``EMA#1``, ``EMA#2`` of several."""
    counts: dict[str, int] = {}
    names = []
    for one in classes:
        counts[one] = counts.get(one, 0) + 1
        names.append(f"{one}#{counts[one]}" if classes.count(one) > 1 else one)
    return names


def plan_variants(
    given: Sequence[Variant], callbacks: Sequence[str], *, each: bool, pairs: bool, only: bool
) -> list[Variant]:
    """Returns all variants of a study, the one first that the others are compared with.

    ``callbacks`` are the script's, as :func:`numbered` names them. Raises ConfigError where what is
    wanted does not go together.
    """
    single = [v for v in given if len(v.changes) == 1 and v.changes[0].kind == "without"]
    targets = [v.changes[0].what for v in single]
    if only:
        return _added_to_none(given, targets, callbacks, single, each or pairs)
    variants = [Variant(BASE), *given]
    if each:
        targets += [name for name in callbacks if name not in targets]
        variants += [Variant.of([Change("without", name)]) for name in targets]
    if pairs:
        if len(targets) < 2:
            raise ConfigError(
                "--pairs leaves out two callbacks at a time: name two or more (--without A "
                "--without B), or all of them by --each"
            )
        both = combinations([Change("without", name) for name in targets], 2)
        variants += [Variant.of(pair) for pair in both]
    if len(unlike := _unlike(variants)) == 1:
        raise ConfigError(
            "there is nothing to compare: name what to change, by --without CALLBACK, --set "
            "CALLBACK.ARGUMENT=VALUE, --arg=\"SCRIPT'S ARGUMENTS\", or --each. The script's "
            f"callbacks are {', '.join(callbacks) or 'none'}"
        )
    return unlike


def _added_to_none(
    given: Sequence[Variant],
    named: list[str],
    callbacks: Sequence[str],
    single: list[Variant],
    more: bool,
) -> list[Variant]:
    if more or len(single) != len(given):
        raise ConfigError(
            "--only leaves out all callbacks (or those of --without), and adds one at a time: it "
            "goes with --without alone, not with --each, --pairs, --set, --arg or --variant"
        )
    targets = named or list(callbacks)
    if not targets:
        raise ConfigError("--only: the script has no callbacks to add one at a time")
    out = [Change("without", name) for name in targets]
    # Where others stay, "only" and "none" would not be true.
    word, base = ("with", "") if named else ("only", NONE)
    ones = [
        Variant.of([one for one in out if one.what != name], f"{word} {name}") for name in targets
    ]
    whole = [Variant("all")] if len(targets) > 1 else []
    return [Variant.of(out, base), *ones, *whole]


def _unlike(variants: list[Variant]) -> list[Variant]:
    """Returns them less those that change the same as an earlier one; ConfigError for one name."""
    found: dict[frozenset[Change], Variant] = {}
    for one in variants:
        found.setdefault(frozenset(one.changes), one)
    names = [one.name for one in found.values()]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two variants are named {twice[0]!r} and change different things")
    return list(found.values())
