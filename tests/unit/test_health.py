"""Which nodes are called slow, by numbers; and what `dtrain health` says and writes."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dtrain.distributed
from dtrain.cli import app
from dtrain.distributed.health import _expanded, wanted
from dtrain.distributed.health_verdict import Health, judge, pairings
from dtrain.errors import ConfigError, LaunchError


@pytest.mark.parametrize("count", range(2, 12))
def test_each_round_has_a_node_once_and_each_node_has_two_others(count: int) -> None:
    rounds = pairings(count)
    for pairs in rounds:
        both = [node for pair in pairs for node in pair]
        assert len(both) == len(set(both))
    pairs = [frozenset(pair) for one in rounds for pair in one]
    assert len(pairs) == len(set(pairs))
    partners = {
        node: {*range(count)} & set().union(*(p - {node} for p in pairs if node in p))
        for node in range(count)
    }
    assert all(len(some) >= min(2, count - 1) for some in partners.values())
    assert len(rounds) <= 4


def test_one_node_is_compared_with_nobody() -> None:
    assert pairings(1) == []


Pair = tuple[int, int]


def links(count: int, slow: Iterable[int] = (), pair: Pair | None = None) -> dict[Pair, float]:
    """What is measured where some nodes, or a pair of them, move a tenth of the others' 1000."""
    all_pairs = [pair for pairs in pairings(count) for pair in pairs]
    return {one: 100.0 if {*slow} & {*one} or one == pair else 1000.0 for one in all_pairs}


def test_all_well() -> None:
    health = judge(["a", "b", "c"], [{0: 90.0}, {1: 51.0}, {2: 100.0}], links(3))
    assert health.findings == []
    assert [node.mb_s for node in health.nodes] == [1000.0] * 3
    assert health.best(2) == ["a", "b"]


def test_a_node_is_as_slow_as_its_slowest_device() -> None:
    gflops = [{0: 100.0, 1: 101.0}, {2: 102.0, 3: 40.0}, {4: 103.0, 5: 104.0}]
    health = judge(["a", "b", "c"], gflops, links(3))
    assert health.findings == ["node b computes 40 GFLOP/s (rank 3), where the median is 102"]
    assert health.best(2) == ["a", "c"]


def test_of_two_nodes_one_is_compared_with_the_other() -> None:
    health = judge(["a", "b"], [{0: 100.0}, {1: 49.0}], links(2))
    assert health.findings == ["node b computes 49 GFLOP/s (rank 1), where the median is 100"]
    assert judge(["a", "b"], [{0: 100.0}, {1: 51.0}], links(2)).findings == []


@pytest.mark.parametrize("count", [3, 4, 5, 6, 9])
@pytest.mark.parametrize("slow", range(3))
def test_a_slow_node_is_told_from_its_neighbours(count: int, slow: int) -> None:
    names = [f"n{i}" for i in range(count)]
    health = judge(names, [{i: 1.0} for i in range(count)], links(count, {slow}))
    words = "moves 100 MB/s to and from any other, where the median is 1000"
    assert health.findings == [f"node n{slow} {words}"]
    assert health.best(count - 1) == [name for name in names if name != f"n{slow}"]


def test_so_is_a_node_between_two_slow_ones() -> None:
    names = [f"n{i}" for i in range(6)]
    health = judge(names, [{i: 1.0} for i in range(6)], links(6, {0, 2}))
    assert [words.split()[1] for words in health.findings] == ["n0", "n2"]


@pytest.mark.parametrize("count", [3, 4, 5])
def test_a_slow_link_names_the_pair(count: int) -> None:
    names = [f"n{i}" for i in range(count)]
    health = judge(names, [{i: 1.0} for i in range(count)], links(count, pair=(1, 2)))
    words = "move 100 MB/s between them, where the median is 1000"
    assert health.findings == [f"nodes n1 and n2 {words}"]
    assert "n2" not in health.best(count - 1)
    assert health.best(count) == names


def test_a_pair_that_nothing_passes_is_named_where_there_is_no_other() -> None:
    health = judge(["a", "b"], [{0: 1.0}, {1: 1.0}], {(0, 1): 0.0})
    assert health.findings == ["nodes a and b move 0 MB/s between them"]


def test_who_says_nothing_is_never_chosen_and_its_partners_are_not_blamed() -> None:
    speeds = links(3) | {(0, 1): 0.0, (1, 2): 0.0}
    health = judge(["a", "b", "c"], [{0: 1.0}, {}, {2: 1.0}], speeds, {1: [1]})
    assert health.findings == ["node b says nothing (rank 1)"]
    assert health.best(3) == ["a", "c"]


def test_of_several_slow_nodes_the_slowest_goes_first() -> None:
    gflops = [{0: 30.0}, {1: 100.0}, {2: 20.0}, {3: 100.0}, {4: 100.0}]
    health = judge(list("abcde"), gflops, links(5))
    assert health.best(4) == ["a", "b", "d", "e"]
    assert health.best(3) == ["b", "d", "e"]


def test_all_equally_slow_is_nobodys_fault() -> None:
    assert (
        judge(["a", "b", "c"], [{0: 1.0}, {1: 1.0}, {2: 1.0}], links(3, {0, 1, 2})).findings == []
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n1", ["n1"]),
        ("n[1-3]", ["n1", "n2", "n3"]),
        ("gpu[03-05,9],x1", ["gpu03", "gpu04", "gpu05", "gpu9", "x1"]),
        ("r[1-2]n[7,9]-ib", ["r1n7-ib", "r1n9-ib", "r2n7-ib", "r2n9-ib"]),
        ("", []),
    ],
)
def test_slurms_lists_of_nodes(text: str, names: list[str]) -> None:
    assert _expanded(text) == names


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DTRAIN_HEALTH", raising=False)
    assert (wanted(True), wanted(False)) == (True, False)
    monkeypatch.setenv("DTRAIN_HEALTH", "off")
    assert not wanted(True)
    monkeypatch.setenv("DTRAIN_HEALTH", "no")
    with pytest.raises(ConfigError, match="DTRAIN_HEALTH='no': must be on or off"):
        wanted(True)


# ------------------------------------------------------------------------------ dtrain health


def run(
    monkeypatch: pytest.MonkeyPatch, found: tuple[int, Health | None], *arguments: str
) -> tuple[int, list[str]]:
    monkeypatch.setattr(dtrain.distributed, "examine_job", lambda within_s: found)
    done = CliRunner().invoke(app, ["health", *arguments])
    return done.exit_code, done.output.splitlines()


SLOW = judge(["a", "b", "c"], [{0: 90.0}, {1: 12.0}, {2: 100.0}], links(3))
WELL = judge(["a", "b"], [{0: 90.0}, {1: 91.0}], links(2))


def test_it_shows_figures_and_names_the_slow_one(monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = run(monkeypatch, (0, SLOW))
    assert code == 1
    assert [line.split()[1::2] for line in lines if line.startswith("│")] == [
        ["a", "90", "1000"],
        ["b", "12", "1000"],
        ["c", "100", "1000"],
    ]
    assert lines[-1] == "node b computes 12 GFLOP/s (rank 1), where the median is 90"


def test_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = run(monkeypatch, (0, WELL))
    assert (code, lines[-1]) == (0, "no node is slower than half the median")


def test_it_chooses_nodes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "nodes"
    code, lines = run(monkeypatch, (0, SLOW), "--keep=2", f"--file={file}")
    assert (code, lines[-1]) == (0, "chosen: a c; left out: b")
    assert file.read_text() == "a\nc\n"
    code, lines = run(monkeypatch, (0, WELL), "--keep=2", f"--file={file}")
    assert (code, lines[-1]) == (0, "chosen: a b; left out: none")


def test_too_few_answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    silent = judge(["a", "b"], [{0: 1.0}, {}], {}, {1: [1]})
    code, lines = run(monkeypatch, (0, silent), "--keep=2", f"--file={tmp_path / 'nodes'}")
    assert code == 1
    assert lines[-1] == "dtrain health: only 1 of the 2 nodes that are wanted answers"


def test_other_ranks_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, (1, None)) == (0, [])


def test_one_node_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = run(monkeypatch, (0, None))
    assert (code, lines) == (
        2,
        ["dtrain health: all ranks are on one node: there is nothing to compare"],
    )


def test_a_number_without_a_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = run(monkeypatch, (0, SLOW), "--keep=2")
    assert code == 2
    assert lines == [
        "dtrain health: --keep says how many nodes, and --file where to write them: give both"
    ]


def test_who_starts_it_alone_is_told_how(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LaunchError, match="start it on each of them, as `srun"):
        dtrain.distributed.examine_job(1.0)
