"""Which ranks hold a model among themselves, and which hold replicas of it."""

from typing import Literal, NamedTuple

import torch
from torch.distributed import group
from torch.distributed.device_mesh import DeviceMesh

from dtrain.distributed import Groups, World, grid_of, hosts_of
from dtrain.errors import ConfigError


class Layout(NamedTuple):
    """Where a model's parts are, and this rank's groups."""

    replicas: int
    ranks: int  # of each replica
    hosts: int
    per_host: bool  # a replica's ranks are those of one host
    groups: Groups
    mesh: DeviceMesh  # over which parameters are sharded
    slices: DeviceMesh | None = None  # and over which these are sliced before (tensor parallel)

    def words(self) -> str:
        """Returns what the start block says."""
        if self.replicas > 1:
            each = ", one for each host" if self.per_host else ""
            return f"sharded over {self.ranks} ranks, in {self.replicas} replicas{each}"
        where = f"sharded over {self.ranks} ranks"
        if self.slices is not None:
            return f"{where}, in slices over {self.slices.size()} each (tensor parallel)"
        if self.hosts == 1:
            return where
        return f"{where} on {self.hosts} hosts (with FSDP(replicas='hosts') over those of a host)"


def layout_of(replicas: Literal["hosts"] | int | None, tensor: int, world: World) -> Layout:
    """Returns it; raises ConfigError, on all ranks, where ``replicas`` do not suit these.

    By default there is one, whose ranks are all: a model that needs them all would not fit into
    one host's, and what a rank holds is to be known before it is run.

    Ranks: all, communicates.
    """
    places = world.comm.gather_objects("places of ranks", (world.host, world.local_rank))
    hosts = hosts_of(places)
    if tensor > 1:
        return _sliced(tensor, hosts, world)
    grid = grid_of(replicas, hosts)
    if len(grid) > 1:
        assert world.open_groups is not None
        groups = world.open_groups(grid)
    else:
        assert group.WORLD is not None
        groups = Groups(group.WORLD, None)
    per_host = {frozenset(row) for row in grid} == {frozenset(host) for host in hosts}
    mesh = DeviceMesh.from_group(groups.row, world.device.type)
    return Layout(len(grid), len(grid[0]), len(hosts), per_host, groups, mesh)


def _sliced(tensor: int, hosts: list[list[int]], world: World) -> Layout:
    """Neighbouring ranks hold slices; those of the same slices shard them."""
    size = world.size
    if size % tensor or size == tensor:
        raise ConfigError(
            f"FSDP(tensor={tensor}) on {size} ranks: slices go to {tensor} ranks each, and what is "
            "sliced is sharded, so there must be a multiple of them, at least twice as many"
        )
    if any(len({rank // tensor for rank in host}) * tensor != len(host) for host in hosts):
        raise ConfigError(
            f"FSDP(tensor={tensor}): ranks that compute each batch together would be on different "
            "hosts, and wait for one another in each layer: number ranks host by host, and start "
            f"a multiple of {tensor} on each"
        )
    grid = tuple(tuple(range(start, start + tensor)) for start in range(0, size, tensor))
    assert world.open_groups is not None
    groups = world.open_groups(grid)
    assert groups.column is not None
    mesh = DeviceMesh.from_group(
        [groups.column, groups.row],
        world.device.type,
        mesh=torch.tensor(grid),
        mesh_dim_names=("ranks", "slices"),
    )
    among = Groups(groups.column, None)
    return Layout(1, len(grid), len(hosts), False, among, mesh["ranks"], mesh["slices"])
