"""The whole examination: what each host sees by itself, then what ranks see together."""

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dtrain.distributed import World, init
from dtrain.doctor import together
from dtrain.doctor.findings import Finding, merged
from dtrain.doctor.here import differing, look_here, versions
from dtrain.errors import CommError, LaunchError, RemoteError

_MEET_S = 60.0


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was found; alike on all ranks that could meet."""

    findings: list[Finding]
    is_main: bool  # this rank is to tell

    @property
    def works(self) -> bool:
        """Whether a run would work."""
        return all(finding.level != "wrong" for finding in self.findings)

    def as_json(self) -> dict[str, Any]:
        """Returns JSON values, for a request for help."""
        return {"works": self.works, "findings": [asdict(finding) for finding in self.findings]}


def examine(run_dir: Path) -> Examination:
    """Looks at everything that a run needs; alone, under a launcher, or on each node of a job.

    What does not work is a finding, not an exception. Ranks: all, communicates.
    """
    try:
        world = init(timeout_s=_MEET_S, health=False)
    except LaunchError as error:
        local = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        here = look_here(run_dir, local_ranks=local, alone=True)
        failed = Finding("wrong", "ranks", str(error).replace("\n", "; "))
        # All that could tell something is needed: nobody knows who is missing.
        return Examination([_versions(), *here, failed], is_main=True)
    findings = [_versions()]
    try:
        findings += _of_hosts(run_dir, world)
        findings += _of_all(run_dir, world, usable=_usable(findings))
    except (CommError, RemoteError) as error:
        words = f"{type(error).__name__}: {error}".partition("\n")[0]
        findings.append(Finding("wrong", "ranks", words))
    return Examination(findings, world.is_main)


def _versions() -> Finding:
    told = ", ".join(f"{name} {one}" for name, one in versions().items())
    return Finding("fine", "versions", told)


def _of_hosts(run_dir: Path, world: World) -> Iterator[Finding]:
    comm = world.comm
    hosts = comm.gather_objects("hosts", world.host)
    local = hosts.count(world.host)
    first = hosts.index(world.host) == world.rank
    with comm.activity.long_operation("looking at this host"):
        mine = look_here(run_dir, local_ranks=local, alone=world.size == 1) if first else []
    told = comm.gather_objects("what each host sees", mine)
    yield from merged((host, found) for host, found in zip(hosts, told, strict=True) if found)
    yield from differing(dict(enumerate(comm.gather_objects("versions", versions()))))


def _usable(findings: list[Finding]) -> bool:
    return not any(one.subject == "run_dir" and one.level == "wrong" for one in findings)


def _of_all(run_dir: Path, world: World, *, usable: bool) -> Iterator[Finding]:
    if world.size > 1:
        yield together.ranks(world)
        yield from together.clocks(world)
        yield from together.network(world)
    if not usable:
        return  # that is told already
    if world.size > 1:
        shared = [*together.one_folder(run_dir, world)]
        yield from shared
        if any(one.level == "wrong" for one in shared):
            return
    yield from together.a_real_step(run_dir, world)
    if world.size == 1:
        yield Finding(
            "note",
            "ranks",
            "one only: what ranks see of one another was not looked at",
            "start it as a run is started: `torchrun --nproc-per-node 2 -m dtrain doctor`, or "
            "`srun dtrain doctor` in a job",
        )
