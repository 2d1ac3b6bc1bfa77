"""Which ranks hold a model among themselves, and which hold replicas of it."""

from typing import Literal, NamedTuple

from torch.distributed import group

from dtrain.distributed import Groups, World, grid_of, hosts_of


class Layout(NamedTuple):
    """Where a model's parts are, and this rank's groups."""

    replicas: int
    ranks: int  # of each replica
    hosts: int
    per_host: bool  # a replica's ranks are those of one host
    groups: Groups

    def words(self) -> str:
        """Returns what the start block says."""
        if self.replicas > 1:
            each = ", one for each host" if self.per_host else ""
            return f"sharded over {self.ranks} ranks, in {self.replicas} replicas{each}"
        where = f"sharded over {self.ranks} ranks"
        if self.hosts == 1:
            return where
        return f"{where} on {self.hosts} hosts (with FSDP(replicas='hosts') over those of a host)"


def layout_of(replicas: Literal["hosts"] | int | None, world: World) -> Layout:
    """Returns it; raises ConfigError, on all ranks, where ``replicas`` do not suit these.

    By default there is one, whose ranks are all: a model that needs them all would not fit into
    one host's, and what a rank holds is to be known before it is run.

    Ranks: all, communicates.
    """
    places = world.comm.gather_objects("places of ranks", (world.host, world.local_rank))
    hosts = hosts_of(places)
    grid = grid_of(replicas, hosts)
    if len(grid) > 1:
        assert world.open_groups is not None
        groups = world.open_groups(grid)
    else:
        assert group.WORLD is not None
        groups = Groups(group.WORLD, None)
    per_host = {frozenset(row) for row in grid} == {frozenset(host) for host in hosts}
    return Layout(len(grid), len(grid[0]), len(hosts), per_host, groups)
