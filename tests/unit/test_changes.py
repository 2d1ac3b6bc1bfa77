"""What a variant changes: how it is written, what it touches, and what it refuses."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dtrain.callback import Callback
from dtrain.errors import ConfigError
from dtrain.trials.ablation import listed_seeds, listed_variants
from dtrain.trials.changes import BASE, NONE, Change, Variant, numbered, plan_variants
from dtrain.trials.overriding import (
    check,
    check_optimizer,
    judged_by,
    override,
    refuse,
    remember_arguments,
)
from dtrain.trials.study import devices_of
from dtrain.trials.study_files import RunNote, StudyFolder, StudyNote, slug, write_run


@pytest.fixture(autouse=True)
def _remembering():
    remember_arguments()
    yield
    # Deleted, it would leave a class that Python no longer lets take arguments.
    Callback.__new__ = lambda cls, *args, **kwargs: object.__new__(cls)


def named(names, **options):
    flags = {"each": False, "pairs": False, "only": False} | options
    return [v.name for v in plan_variants(names, ["EMA", "Clip", "Guard"], **flags)]


def without(name):
    return Variant.of([Change("without", name)])


def test_a_change_reads_as_it_is_written():
    for text in ("without EMA#2", "EMA.decay=0.9", "optimizer.lr=1e-3", "--lr 0.01 --wide"):
        assert str(Change.read(text)) == text
    assert Change.parse("set", " EMA.betas = (0.9, 0.95) ").value == (0.9, 0.95)
    assert Change.parse("set", "EMA.warmup=false").value is False
    assert Change.parse("set", "EMA.every=None").value is None
    assert Change.parse("set", "EMA.name=cosine").value == "cosine"


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("set", "decay=0.9"),
        ("set", "EMA.decay"),
        ("set", "EMA.decay.x=1"),
        ("set", "EMA#0.decay=1"),
        ("without", ""),
        ("without", "EMA, Clip"),
        ("without", "EMA,Clip"),
        ("without", "EMA.decay=1"),
        ("arg", ""),
        ("arg", "--name 'open"),
    ],
)
def test_what_is_no_change_is_refused_with_an_example(kind, text):
    with pytest.raises(ConfigError, match=f"--{kind}"):
        Change.parse(kind, text)


def test_variants_of_a_study():
    assert named([without("EMA")]) == [BASE, "without EMA"]
    assert named([], each=True) == [BASE, "without EMA", "without Clip", "without Guard"]
    assert named([without("EMA")], each=True)[1:] == [
        "without EMA",
        "without Clip",
        "without Guard",
    ]
    assert named([without("EMA"), without("Clip")], pairs=True)[3:] == ["without EMA, without Clip"]
    assert len(named([], each=True, pairs=True)) == 1 + 3 + 3
    assert named([], only=True) == [NONE, "only EMA", "only Clip", "only Guard", "all"]
    assert named([without("EMA"), without("Clip")], only=True) == [
        "without EMA, without Clip",
        "with EMA",
        "with Clip",
        "all",
    ]
    only = plan_variants([], ["EMA", "Clip"], each=False, pairs=False, only=True)
    assert [str(c) for c in only[1].changes] == ["without Clip"]
    # The same changes are one variant, in whatever order.
    both = [Change("without", "EMA"), Change("without", "Clip")]
    assert named([Variant.of(both), Variant.of(both[::-1])]) == [BASE, "without EMA, without Clip"]


@pytest.mark.parametrize(
    ("given", "options", "words"),
    [
        ([], {}, "nothing to compare.*EMA, Clip, Guard"),
        ([without("EMA")], {"pairs": True}, "name two or more"),
        ([], {"only": True, "each": True}, "--only"),
        ([Variant.of([Change("arg", "--lr 1")])], {"only": True}, "--only"),
        ([Variant("x", (Change("arg", "--a"),)), Variant("x", (Change("arg", "--b"),))], {}, "'x'"),
    ],
)
def test_what_does_not_go_together_is_refused(given, options, words):
    with pytest.raises(ConfigError, match=words):
        named(given, **options)


def test_variants_from_python():
    found = listed_variants(["EMA"], ["EMA.decay=0.9"], ["--lr 1"], {"two": ["without EMA", "--x"]})
    assert [v.name for v in found] == ["without EMA", "EMA.decay=0.9", "--lr 1", "two"]
    assert found[3].arguments == ["--x"]
    assert found[3].overrides == [{"kind": "without", "what": "EMA", "text": ""}]
    assert [Variant.from_json({"name": v.name, "changes": v.overrides}) for v in found[:2]] == (
        found[:2]
    )
    with pytest.raises(ConfigError, match="changes nothing"):
        listed_variants([], [], [], {"none": []})


@pytest.mark.parametrize("seeds", [0, [], [1, 1], [-1], [2**32]])
def test_what_are_no_seeds(seeds):
    with pytest.raises(ConfigError, match="seeds="):
        listed_seeds(seeds)


# -- what a change touches ------------------------------------------------------------------------


class Average(Callback):
    def __init__(self, decay=0.9, *, every: int = 1, warmup: bool = True) -> None:
        self.decay, self.every, self.warmup = decay, every, warmup


class Holder(Callback):
    def __init__(self, other):
        self.other = other


class Passing(Average):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)


@dataclass
class Data(Callback):
    size: float = 1.0
    mode: str = "min"


class Module(nn.Module, Callback):
    def __init__(self, width: int = 2):
        super().__init__()
        self.layer = nn.Linear(width, 1)


def changed(text, callbacks):
    return override([Change.read(text)], callbacks)


def test_a_callback_is_left_out_by_class_number_or_name():
    first, second, clip = Average(), Average(0.5), Holder(None)
    second.name = "slow"
    assert changed("without Average", [first, clip, second])[0] == [clip]
    assert changed("without Average#2", [first, clip, second])[0] == [first, clip]
    assert changed("without slow", [first, clip, second])[0] == [first, clip]
    left, _, idle = changed("without Average#3", [first, clip, second])
    assert left == [first, clip, second]
    assert [str(one) for one in idle] == ["without Average#3"]
    assert numbered(["A", "B", "A"]) == ["A#1", "B", "A#2"]


def test_an_argument_changes_where_the_callback_is_held():
    average = Average(0.5, every=3)
    holder = Holder(average)
    average.name = "mine"
    average.on_save = lambda ctx: None
    average.seen = 7
    left, _, idle = changed("Average.decay=0.25", [average, holder])
    assert left == [average, holder]
    assert not idle
    assert holder.other is average
    assert (average.decay, average.every, average.name) == (0.25, 3, "mine")
    assert callable(vars(average)["on_save"])
    assert not hasattr(average, "seen")


def test_arguments_of_every_kind_of_class():
    passing, data, module = Passing(0.5), Data(), Module()
    changed("Passing.every=4", [passing])
    assert (passing.decay, passing.every) == (0.5, 4)
    changed("Data.size=2.5", [data])
    assert data.size == 2.5
    changed("Module.width=5", [module])
    assert module.layer.weight.shape == (1, 5)


def test_of_several_it_must_be_said_which():
    with pytest.raises(ConfigError, match="there are 2 of Average; say which: Average#1"):
        changed("Average.decay=0.25", [Average(), Average()])
    first, second = Average(), Average()
    changed("Average#2.decay=0.25", [first, second])
    assert (first.decay, second.decay) == (0.9, 0.25)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("without Averag", "touches nothing.*did you mean Average.*It has Average, Data"),
        ("Clip.norm=1", "touches nothing.*It has Average, Data"),
        ("Average.decy=0.1", "no argument 'decy'; did you mean decay.*decay=0.9, every=1"),
        ("Average.decay=0.9", "changes nothing: it is 0.9 in the script, too"),
        ("Average.warmup=True", "changes nothing: it is True"),
        ("Average.decay=fast", "decay is a number in the script .0.9., and 'fast' is none"),
    ],
)
def test_what_touches_nothing_is_refused_with_what_there_is(text, words):
    callbacks = [Average(), Data()]
    with pytest.raises(ConfigError, match=words):
        check(Change.read(text), callbacks)
    assert (callbacks[0].decay, callbacks[0].warmup) == (0.9, True)


def test_a_further_trainer_may_lack_it():
    _, _, idle = changed("Clip.norm=1", [Average()])
    with pytest.raises(ConfigError, match="touches nothing"):
        refuse(idle, [Average()])


def test_the_optimizer_is_looked_at_before_anything_trains():
    model = nn.Linear(2, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    check_optimizer(Change.read("optimizer.lr=0.2"), sgd)
    with pytest.raises(ConfigError, match="SGD has no 'momntum'; did you mean momentum"):
        check_optimizer(Change.read("optimizer.momntum=0.2"), sgd)
    with pytest.raises(ConfigError, match=r"changes nothing: it is 0\.1"):
        check_optimizer(Change.read("optimizer.lr=0.1"), sgd)
    assert override([Change.read("optimizer.lr=0.2")], []) == ([], {"lr": 0.2}, [])


def test_what_the_script_itself_judges_by():
    class Stop(Callback):
        def __init__(self, monitor, mode="min"):
            pass

    class Save(Callback):
        def __init__(self, best=None, mode="min"):
            pass

    assert judged_by([Stop("eval/acc", "max"), Save()]) == ["eval/acc", "max"]
    assert judged_by([Stop("eval/loss"), Save("eval/f1", mode="max")]) == ["eval/f1", "max"]
    assert judged_by([Average(), Stop(len)]) is None


# -- the folder, and the machine ------------------------------------------------------------------


def test_no_two_variants_share_a_folder():
    names = [
        "without EMA",
        "without-EMA",
        "--lr 0.01",
        "--lr 0,01",
        "a/b",
        "a b",
        "ä" * 80,
        "ö" * 80,
    ]
    assert len({slug(name) for name in names}) == len(names)
    assert slug("without EMA") == "without-EMA"
    assert all("/" not in slug(name) and len(slug(name)) < 80 for name in names)


def test_a_study_is_read_as_it_was_written(tmp_path):
    folder = StudyFolder(tmp_path / "study")
    assert folder.read() is None
    note = StudyNote("s.py", ["--x"], "abc", 2, variants=[Variant(BASE), without("EMA")])
    note.runs = [(BASE, 0), ("without EMA", 0)]
    folder.write(note)
    assert folder.read() == note
    (folder.path / "study.json").write_text("{")
    with pytest.raises(ConfigError, match=r"study\.json cannot be read.*another --folder"):
        folder.read()


def test_one_command_at_a_time(tmp_path):
    import subprocess
    import sys

    folder = StudyFolder(tmp_path)
    code = (
        "import sys; from pathlib import Path; from dtrain.trials.study_files import StudyFolder\n"
        "with StudyFolder(Path(sys.argv[1])).locked(): pass"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with folder.locked():
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "another dtrain ablate is at work" in done.stderr
    assert subprocess.run(command, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize(
    ("status", "fits", "kept"),
    [("running", 1, True), ("failed", 1, True), ("finished", 1, False), ("running", 2, False)],
)
def test_a_start_goes_on_or_finds_an_empty_folder(tmp_path, status, fits, kept):
    folder = StudyFolder(tmp_path)
    there = folder.prepare_run("a b", 3)
    assert there == tmp_path / "a-b" / "seed-3"
    write_run(there, RunNote("a b", 3, fits=fits))
    (there / "status.json").write_text(f'{{"status": "{status}"}}')
    (there / "mark").touch()
    assert folder.prepare_run("a b", 3) == there
    assert (there / "mark").exists() == kept


def test_gpus_are_divided(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert devices_of(1, jobs=2, ranks=2) == {"CUDA_VISIBLE_DEVICES": "6,7"}
    with pytest.raises(ConfigError, match="need 6 GPUs, and there are 4"):
        devices_of(0, jobs=3, ranks=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices_of(0, jobs=3, ranks=2) == {}


class MakesItself(Callback):
    """Hands nothing on of what it is made of."""

    def __new__(cls, *args, **kwargs):
        return super().__new__(cls)

    def __init__(self, size, kept=1):
        self.size, self.kept = size, kept


def test_a_callback_with_a_new_of_its_own_keeps_its_arguments():
    """Made again it would lose those that are not changed, so it is refused."""
    one = MakesItself(2, kept=7)
    assert judged_by([one]) is None
    change = Change.parse("set", "MakesItself.size=3")
    with pytest.raises(ConfigError, match="made by a __new__ of its own"):
        check(change, [one])
    assert (one.size, one.kept) == (2, 7)
    assert override([Change.parse("without", "MakesItself")], [one])[0] == []
