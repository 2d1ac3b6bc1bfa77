"""Which nodes are slow, by what was measured; and which of them move data together for that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median_high


@dataclass(frozen=True, slots=True)
class Node:
    """One node's figures; None where there is none."""

    name: str
    gflops: float | None  # of its slowest device
    mb_s: float | None  # with the partner to which it is fastest
    trouble: str = ""  # in words
    pace: float = 1.0  # as a part of the median's, where it is in trouble; 0: it says nothing

    def figures(self) -> list[str]:
        """Returns both, as they are shown."""
        return ["-" if one is None else shown(one) for one in (self.gflops, self.mb_s)]


@dataclass(frozen=True, slots=True)
class Health:
    """What was measured, and what is wrong with it."""

    nodes: list[Node]
    findings: list[str]  # in words, each about a node or a pair of them

    def best(self, count: int) -> list[str]:
        """Returns the names of ``count`` nodes, or of all that answer: not the slowest."""
        there = [node for node in self.nodes if node.pace]
        chosen = sorted(there, key=lambda node: -node.pace)[:count]
        return [node.name for node in there if node in chosen]


def shown(figure: float) -> str:
    """Returns a figure with three digits or more, and no power of ten."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.3g}"


def pairings(count: int) -> list[list[tuple[int, int]]]:
    """Returns rounds of pairs of nodes: a ring's, and then each node with one across the ring.

    In a round each node is in one pair at most. The last round tells a node between two slow ones.
    """
    ring = [(i, (i + 1) % count) for i in range(count if count > 2 else count - 1)]
    rounds = [ring[0 : count - 1 : 2], ring[1 : count - 1 : 2], ring[count - 1 :]]
    if count % 2 == 0:
        rounds[1:] = [rounds[1] + rounds[2]]
    if count > 3:
        rounds.append([(i, i + count // 2) for i in range(count // 2)])
    return [pairs for pairs in rounds if pairs]


def judge(
    names: Sequence[str],
    gflops: Sequence[Mapping[int, float]],
    links: Mapping[tuple[int, int], float],
    silent: Mapping[int, Sequence[int]] | None = None,
) -> Health:
    """Finds what is slower than half the median, of the two in the middle the higher one.

    So of two nodes, one is compared with the other. The order of ``names`` counts nodes.

    Args:
        names: of the nodes.
        gflops: of each node, by rank.
        links: MB/s of pairs of nodes; 0 where nothing arrived.
        silent: ranks that said nothing, by node.
    """
    silent = silent or {}
    computed = [value for node in gflops for value in node.values()]
    middle = median_high(computed) if computed else 0.0
    of_node = [[mb_s for pair, mb_s in links.items() if i in pair] for i in range(len(names))]
    best = [max(speeds, default=None) for speeds in of_node]
    moved = [one for one in best if one is not None]
    usual = median_high(moved) if moved else 0.0

    def crawls(mb_s: float) -> bool:
        return mb_s < usual / 2 or not mb_s

    nodes, findings = [], []
    for i, name in enumerate(names):
        rank, slowest = min(gflops[i].items(), key=lambda one: one[1], default=(0, None))
        speed, trouble, pace = best[i], [], 1.0
        if slowest is not None and slowest < middle / 2:
            pace = slowest / middle
            who = f"computes {shown(slowest)} GFLOP/s (rank {rank})"
            trouble.append(f"{who}, where the median is {shown(middle)}")
        if speed is not None and crawls(speed) and len(names) > 2:
            pace = min(pace, speed / (usual or 1.0) or 1e-9)
            moves = f"moves {shown(speed)} MB/s to and from any other"
            trouble.append(f"{moves}, where the median is {shown(usual)}")
        if silent.get(i):
            trouble, pace = [f"says nothing (rank {', '.join(map(str, silent[i]))})"], 0.0
        words = " and ".join(trouble)
        nodes.append(Node(name, slowest, speed, words, pace))
        if words:
            findings.append(f"node {name} {words}")
    for (one, other), mb_s in links.items():
        if crawls(mb_s) and not nodes[one].trouble and not nodes[other].trouble:
            nodes[other] = replace(nodes[other], pace=0.99)  # without it, the pair is none
            usually = f", where the median is {shown(usual)}" if usual else ""
            pair = f"nodes {names[one]} and {names[other]}"
            findings.append(f"{pair} move {shown(mb_s)} MB/s between them{usually}")
    return Health(nodes, findings)
