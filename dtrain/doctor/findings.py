"""What an examination finds."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Level = Literal["fine", "note", "wrong"]  # a run would work; would, but; would not


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        level: ``"wrong"`` where a run would not work.
        subject: what was looked at, in a word or two.
        words: what was found, with values.
        remedy: what to do about it.
        hosts: where; empty if it is of the job as a whole.
    """

    level: Level
    subject: str
    words: str
    remedy: str = ""
    hosts: tuple[str, ...] = ()

    def __str__(self) -> str:
        where = f" ({', '.join(self.hosts)})" if self.hosts else ""
        return f"{self.level:<5}  {self.subject:<14} {self.words}{where}"


def merged(of_hosts: Iterable[tuple[str, list[Finding]]]) -> list[Finding]:
    """Puts what was found alike on several hosts into one finding; one that all share names none.

    In the order of the first host's.
    """
    every = list(of_hosts)
    where: dict[Finding, list[str]] = {}
    for host, findings in every:
        for finding in findings:
            where.setdefault(finding, []).append(host)
    whole = len({host for host, _ in every})
    order = {subject: n for n, subject in enumerate(dict.fromkeys(f.subject for f in where))}
    found = [
        finding if len({*hosts}) == whole else replace(finding, hosts=tuple(dict.fromkeys(hosts)))
        for finding, hosts in where.items()
    ]
    return sorted(found, key=lambda finding: order[finding.subject])
