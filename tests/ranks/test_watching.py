"""Callbacks that watch a run: their figures by hand, their files, and that nothing else changes."""

import json
import resource
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from torch import nn

import dtrain
from dtrain.callbacks import Checkpoint, ClipGradients, GradientAccumulation, throughput
from dtrain.callbacks.gradient_stats import GradientStats, _norms
from dtrain.callbacks.log_samples import LogSamples
from dtrain.callbacks.profile import Profile
from dtrain.callbacks.throughput import PHASES, Throughput
from dtrain.errors import ConfigError, RemoteError
from dtrain.testing import run_processes


class Keep(dtrain.Sink):
    """Keeps all reports."""

    def __init__(self):
        self.reports = []

    def write(self, report):
        self.reports.append(report)


def trainer(*callbacks, sinks=(), net=None, loss=tiny.loss_fn, **options):
    dtrain.init(seed=0)
    net = net or tiny.model()
    return dtrain.Trainer(net, tiny.adam, loss, callbacks=callbacks, sinks=list(sinks), **options)


def train_rows(result):
    return [row for row in result.history if "train/loss" in row]


def refused(fn, *args, **options):
    try:
        fn(*args, **options)
    except (ConfigError, RemoteError) as error:
        return type(error).__name__, str(error)
    return "nothing was raised"


def all_cases(folder):
    """Starting ranks is slow: everything in this file, in one start."""
    return {
        "speeds": speeds(folder / "speeds"),
        "bits": with_and_without(folder / "bits"),
        "profile": profiles(folder / "profile"),
        "norms": gradient_norms(),
        "samples": samples(folder / "samples"),
    }


@dataclass
class Watched:
    world_size: int
    folder: Path
    results: list

    def of(self, case):
        """What each rank returned."""
        return [result[case] for result in self.results]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def watched(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("watched")
    with warnings.catch_warnings():
        warnings.filterwarnings("error")
        return Watched(request.param, folder, run_processes(all_cases, request.param, folder))


# -------------------------------------------------------------------------------------- Throughput


class Clock:
    """Each look at it takes as many seconds as the rank's number, from 1."""

    def __init__(self, tick):
        self.now = 0.0
        self.tick = tick

    def __call__(self):
        self.now += self.tick
        return self.now


class Waste(dtrain.Callback):
    """Time goes by wherever no step is under way."""

    def __init__(self, clock):
        self.clock = clock

    def waste(self, *args):
        self.clock.now += 1000.0

    on_eval_start = on_eval_batch = on_eval_end = on_save = on_epoch_end = on_epoch_start = waste


class SkipAt(dtrain.Callback):
    def __init__(self, hook, step, micro, ranks=(0, 1)):
        self.hook, self.step, self.micro = hook, step, micro
        self.mine = dtrain.init(seed=0).rank in ranks

    def skip(self, ctx, step):
        if self.mine and (step.number, step.micro) == (self.step, self.micro):
            ctx.request.skip("planted")

    def on_batch(self, ctx, step):
        if self.hook == "on_batch":
            self.skip(ctx, step)

    def on_loss(self, ctx, step):
        if self.hook == "on_loss":
            self.skip(ctx, step)


def speed(folder, *callbacks, fake=True, batch_size=12, log_every=2, max_steps=16, **arguments):
    """The figures of each report, without the prefix of their names."""
    dtrain.init(seed=0)
    clock = Clock(dtrain.distributed.current().rank + 1)
    before = throughput.perf_counter
    throughput.perf_counter = clock if fake else before
    run = trainer(
        Throughput(**arguments),
        *callbacks,
        Waste(clock),
        Checkpoint(every_steps=3, keep=1),
        run_dir=folder,
    )
    data = tiny.dataset()
    result = run.fit(
        data, batch_size=batch_size, max_steps=max_steps, log_every=log_every, eval_set=data
    )
    throughput.perf_counter = before
    return [
        {k.removeprefix("throughput/"): v for k, v in row.items() if k.startswith("throughput/")}
        for row in train_rows(result)
    ]


def speeds(folder):
    accumulate = GradientAccumulation(steps=3)
    skipped = [
        speed(folder / f"{hook}{micro}", accumulate, SkipAt(hook, 1, micro), max_steps=2)
        for hook in ("on_batch", "on_loss")
        for micro in (0, 2)
    ]
    counted = speed(
        folder / "count",
        SkipAt("on_batch", 0, 0, [0]),  # on rank 0, nothing can be counted in the first step
        count_flops=True,
        peak_flops=4800.0,
        log_every=1,
        max_steps=4,
    )
    known = {"tokens_per_sample": 5, "flops_per_sample": 100.0, "peak_flops": 1000.0}
    return {
        "plain": speed(folder / "plain", **known),
        "accumulated": speed(folder / "accumulated", accumulate),
        "skipped": skipped,
        "all skipped": speed(folder / "all", SkipAt("on_batch", 1, 0), max_steps=2),
        "counted": counted,
        "real": speed(folder / "real", accumulate, fake=False),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }


def test_throughput(watched):
    world_size, results = watched.world_size, watched.of("speeds")
    found = results[0]
    assert all(one["plain"] == found["plain"] for one in results)
    mean_tick = (1 + world_size) / 2
    mean_pace = sum(1 / (rank + 1) for rank in range(world_size)) / world_size

    # Five looks at the clock: each phase takes one tick, and nothing else counts. Reports are
    # made every 2 steps, and with the checkpoints after 3, 9 and 15.
    assert len(found["plain"]) == 8 + 3
    for row in found["plain"]:
        assert row.pop("memory_gib") > 0.05
        assert row == pytest.approx(
            {
                "step_s": 4 * mean_tick,
                "samples_per_s": 12 / 4 * mean_pace,
                "tokens_per_s": 60 / 4 * mean_pace,
                "tflops_per_s": 100 * 3 * mean_pace / world_size / 1e12,
                "mfu": 100 * 3 * mean_pace / world_size / 1000,
                "data_max_s": world_size,
                **{f"{phase}_share": 0.25 for phase in PHASES},
            },
            rel=1e-12,
        )
    # Three micro-batches: each is waited for, and has a forward and a backward.
    for row in found["accumulated"]:
        assert row["step_s"] == 10 * mean_tick
        assert row["data_max_s"] == 3 * world_size
        shares = {"data": 0.3, "forward": 0.3, "backward": 0.3, "optimizer": 0.1}
        assert {p: row[f"{p}_share"] for p in PHASES} == pytest.approx(shares, rel=1e-12)
    # One of six is skipped, in on_batch or on_loss: it has no backward; in the first case no
    # forward either. The time that ends the step is backward's, as the others' are waited for.
    (first, last, first_loss, last_loss) = (case[0] for case in found["skipped"])
    for row, ticks in (
        (first, {"data": 6, "forward": 5, "backward": 5, "optimizer": 2}),
        (last, {"data": 6, "forward": 5, "backward": 6, "optimizer": 2}),
        (first_loss, {"data": 6, "forward": 6, "backward": 5, "optimizer": 2}),
        (last_loss, {"data": 6, "forward": 6, "backward": 6, "optimizer": 2}),
    ):
        total = sum(ticks.values())
        assert row["step_s"] == pytest.approx(total / 2 * mean_tick, rel=1e-12)
        shares = {phase: count / total for phase, count in ticks.items()}
        assert {p: row[f"{p}_share"] for p in PHASES} == pytest.approx(shares, rel=1e-12)
        assert row["samples_per_s"] == pytest.approx((24 - 4) / total * mean_pace)
    # Where all ranks skip, gradients of zero are handed on, and the time is still the step's.
    (row,) = found["all skipped"]
    assert row["step_s"] == pytest.approx((4 + 3) / 2 * mean_tick)
    assert [row[f"{p}_share"] * 7 for p in PHASES] == pytest.approx([2, 1, 2, 2])
    assert row["samples_per_s"] == pytest.approx(12 / 7 * mean_pace)
    # Two products of 8 x 16 and 16 x 2, two operations each, three times. The step in which a
    # rank counts them is left out: the first, and on rank 0 the second, too. (Alone, it has no
    # report of a first step in which all was skipped.)
    assert [bool(row) for row in found["counted"]] == [False, True, True, True][: 2 + world_size]
    for row in found["counted"][-2:]:
        flops = 3 * 2 * (8 * 16 + 16 * 2)
        assert row["mfu"] == pytest.approx(flops * 3 * mean_pace / world_size / 4800)
    # With a real clock only what must hold is known.
    for row in found["real"]:
        assert sum(row[f"{phase}_share"] for phase in PHASES) == pytest.approx(1)
        assert all(row[f"{phase}_share"] > 0 for phase in PHASES)
        assert row["data_max_s"] > 0
        assert row["memory_gib"] <= max(one["peak"] for one in results) * (1 + 1e-6)
        if world_size == 1:
            assert row["samples_per_s"] * row["step_s"] == pytest.approx(12)


def with_and_without(folder):
    """What training leaves behind, with every watching callback and without."""

    class Dropout(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = tiny.model()

        def forward(self, x):
            return self.net(nn.functional.dropout(x, 0.1, self.training))

    def loss(net, batch):
        return dtrain.Loss(tiny.loss_fn(net, batch).mean, outputs=batch[0])

    found = []
    for name, watching in (
        ("bare", []),
        (
            "watched",
            [
                Profile((1, 4), ranks=(0, 1)),
                Throughput(count_flops=True),
                GradientStats(every=1),
                GradientStats(every=2, per="module"),
                LogSamples(lambda outputs, batch: {"first": str(outputs[0].tolist())}),
            ],
        ),
    ):
        if watching:
            watching[3].name = "GradientStats2"
        run = trainer(
            *watching,
            GradientAccumulation(steps=2),
            ClipGradients(0.1),
            net=Dropout(),
            loss=loss,
            run_dir=folder / name,
        )
        data = tiny.dataset()
        run.fit(data, batch_size=20, epochs=2, log_every=3, eval_set=data)
        found.append((tiny.digest(run.model), torch.get_rng_state().sum().item()))
    return found


def test_watching_changes_no_bit(watched):
    for without, with_callbacks in watched.of("bits"):
        assert without == with_callbacks


def compile_and_count():
    """How often a model is compiled while its FLOPs are counted, and what is counted."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = tiny.model()
    compiled = torch.compile(net, backend=backend)

    def loss(model, batch):
        return nn.functional.cross_entropy(compiled(batch[0]), batch[1])

    run = trainer(Throughput(count_flops=True), net=net, loss=loss)
    result = run.fit(tiny.dataset(), batch_size=12, max_steps=3, log_every=1)
    return len(graphs), "throughput/tflops_per_s" in result.metrics


def test_counting_flops_does_not_stop_torch_compile():
    assert run_processes(compile_and_count, 1) == [(1, True)]


def test_throughput_refuses_what_cannot_work():
    for arguments, words in (
        ({"tokens_per_sample": 0}, r"tokens_per_sample=0\): must be more than 0"),
        ({"flops_per_sample": -1.0}, r"flops_per_sample=-1.0\): must be more than 0"),
        ({"flops_per_sample": 1.0, "count_flops": True}, "not both"),
        ({"peak_flops": 1e12}, "needs flops_per_sample or count_flops"),
    ):
        with pytest.raises(ConfigError, match=words):
            Throughput(**arguments)


# ----------------------------------------------------------------------------------------- Profile


class FailAt(dtrain.Callback):
    def __init__(self, step):
        self.step = step

    def on_grads_ready(self, ctx, step):
        if step.number == self.step:
            raise ConfigError("planted")


def profiles(folder):
    keep = Keep()
    for name, steps, ranks, callbacks in (
        ("chosen", range(2, 4), (0,), []),
        ("all", (2, 3), (1, 0, 7), []),
        ("nobody", (2, 3), (7,), []),
        ("too long", (6, 100), (0,), []),
        ("never", (8, 100), (0,), []),
        ("failed", (1, 5), (0, 1), [FailAt(2)]),
    ):
        run = trainer(Profile(steps, ranks=ranks), *callbacks, sinks=[keep], run_dir=folder / name)
        refused(run.fit, tiny.dataset(), batch_size=12, epochs=1)
    # A run that is continued in the middle of the range.
    for epochs in (1, 2):
        run = trainer(Profile((6, 10)), Checkpoint(), run_dir=folder / "continued")
        run.fit(tiny.dataset(), batch_size=12, epochs=epochs)
    nowhere = trainer(Profile((1, 2)))
    why = refused(nowhere.fit, tiny.dataset(), batch_size=12, epochs=1)
    return why, [report.text for report in keep.reports if report.kind == "message"]


def test_profile(watched):
    world_size, folder = watched.world_size, watched.folder / "profile"
    why, said = watched.of("profile")[0]
    traces = {}
    for path in folder.glob("*/profile/*"):
        events = json.loads(path.read_text())["traceEvents"]
        names = sorted({e["name"] for e in events if e.get("name", "").startswith("step ")})
        run = path.parent.parent.name
        # The model has two layers, and nothing else is recorded than these steps. In the last one
        # of a run that failed, all ranks only hear of that.
        idle = run == "failed" and world_size == 2
        assert [e.get("name") for e in events].count("aten::addmm") == 2 * (len(names) - idle)
        traces[run, path.name] = names
    expected = {
        ("chosen", "rank-00000-step-00000002.json"): ["step 2", "step 3"],
        ("all", "rank-00000-step-00000002.json"): ["step 2"],
        ("too long", "rank-00000-step-00000006.json"): ["step 6", "step 7"],
        ("failed", "rank-00000-step-00000001.json"): ["step 1", "step 2"],
        ("continued", "rank-00000-step-00000006.json"): ["step 6", "step 7"],
        ("continued", "rank-00000-step-00000008.json"): ["step 8", "step 9"],
    }
    if world_size == 2:
        expected["all", "rank-00001-step-00000002.json"] = ["step 2"]
        expected["failed", "rank-00000-step-00000001.json"] = ["step 1", "step 2", "step 3"]
        expected["failed", "rank-00001-step-00000001.json"] = ["step 1", "step 2", "step 3"]
    assert traces == expected
    both = "s 0, 1" if world_size == 2 else " 0"
    assert said == [
        f"profiling steps 2 to 3 on rank 0, into {folder}/chosen/profile",
        f"profiling steps 2 to 2 on rank{both}, into {folder}/all/profile",
        f"Profile: there is no rank 7 among {world_size}; nothing is profiled",
        f"profiling steps 6 to 99 on rank 0, into {folder}/too long/profile",
        f"profiling steps 8 to 99 on rank 0, into {folder}/never/profile",
        f"profiling steps 1 to 4 on rank{both}, into {folder}/failed/profile",
    ]
    assert why == ("ConfigError", "Profile writes traces: pass Trainer(run_dir='runs/...')")


def test_profile_refuses_what_cannot_work():
    for steps in (range(3, 3), (4, 2), range(0, 9, 2), (-1, 3), 5, (1, 2, 3)):
        with pytest.raises(ConfigError, match=r"^Profile\(steps="):
            Profile(steps)
    for ranks in ((), (-1,)):
        with pytest.raises(ConfigError, match=r"^Profile\(ranks="):
            Profile((1, 2), ranks=ranks)


# ----------------------------------------------------------------------------------- GradientStats


class KeepNorms(dtrain.Callback):
    """The norms of each step, by torch."""

    def __init__(self):
        self.norms = []

    def on_grads_ready(self, ctx, step):
        of = {name: p.grad.norm().item() for name, p in ctx.model.named_parameters()}
        for child in ("0", "2"):
            of[child] = torch.cat([p.grad.flatten() for p in ctx.model[int(child)].parameters()])
            of[child] = of[child].norm().item()
        self.norms.append(of)


def gradient_norms():
    found = {}
    for name, callbacks, every, log_every, per in (
        ("parameters", [], 2, 2, "parameter"),
        ("modules", [], 2, 2, "module"),
        ("rarely", [], 3, 2, "parameter"),
        ("often", [], 1, 4, "parameter"),
        ("clipped", [ClipGradients(1e-3)], 2, 2, "parameter"),
    ):
        kept = KeepNorms()
        stats = GradientStats(every, per=per)
        run = trainer(*callbacks, stats, kept, GradientAccumulation(steps=2))
        result = run.fit(tiny.dataset(), batch_size=12, epochs=1, log_every=log_every)
        rows = [
            {k.partition("/")[2]: v for k, v in row.items() if k.startswith("grad_norm/")}
            for row in result.history
        ]
        found[name] = rows, kept.norms
    frozen = tiny.model()
    frozen[0].requires_grad_(False)
    run = dtrain.Trainer(
        frozen,
        torch.optim.SGD(frozen[2].parameters(), lr=0.1),
        tiny.loss_fn,
        callbacks=[GradientStats(1)],
        sinks=[],
    )
    result = run.fit(tiny.dataset(), batch_size=12, max_steps=1, log_every=1)
    found["frozen"] = sorted(name for name in result.metrics if name.startswith("grad_norm/"))
    return found


def test_gradient_stats(watched):
    results = watched.of("norms")
    found = results[0]
    assert all(one == found for one in results)
    parameters = {"0.weight", "0.bias", "2.weight", "2.bias"}

    rows, norms = found["parameters"]
    assert len(rows) == 4
    for row, of in zip(rows, norms[1::2], strict=True):
        assert row == pytest.approx({name: of[name] for name in parameters}, rel=1e-6)
    rows, norms = found["modules"]
    for row, of in zip(rows, norms[1::2], strict=True):
        assert row == pytest.approx({name: of[name] for name in ("0", "2")}, rel=1e-6)
    # Computed after steps 3 and 6, reported after 4 and 6, and in no other report.
    rows, norms = found["rarely"]
    assert [bool(row) for row in rows] == [False, True, True, False]
    assert rows[1]["0.weight"] == pytest.approx(norms[2]["0.weight"], rel=1e-6)
    assert rows[2]["0.weight"] == pytest.approx(norms[5]["0.weight"], rel=1e-6)
    rows, norms = found["often"]
    mean = sum(of["0.weight"] for of in norms[:4]) / 4
    assert rows[0]["0.weight"] == pytest.approx(mean, rel=1e-6)
    rows, _ = found["clipped"]
    for row in rows:
        assert sum(row[name] ** 2 for name in parameters) == pytest.approx(1e-6, rel=1e-3)
    assert found["frozen"] == ["grad_norm/2.bias", "grad_norm/2.weight"]


def test_norms_of_small_and_mixed_types():
    big = torch.full((4,), 300.0, dtype=torch.float16)  # their sum of squares is no float16
    one = torch.ones(9)
    assert [norm.item() for norm in _norms([big, one])] == [600.0, 3.0]
    assert _norms([big, one])[0].dtype == torch.float32
    assert _norms([one.double(), one])[1].dtype == torch.float64


def test_gradient_stats_refuses_what_cannot_work():
    for every in (0, -1, True):
        with pytest.raises(ConfigError, match=r"^GradientStats\(every="):
            GradientStats(every)
    with pytest.raises(ConfigError, match="choose 'parameter' or 'module'"):
        GradientStats(per="layer")


# -------------------------------------------------------------------------------------- LogSamples

PICTURE = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


def samples(folder):
    world = dtrain.init(seed=0)
    calls = []

    def eval_loss(net, batch):
        loss = tiny.loss_fn(net, batch)
        return dtrain.Loss(loss.mean, outputs=batch[0][:, 0])

    def fn(outputs, batch):
        calls.append(outputs.tolist())
        assert torch.equal(batch[0][:, 0], outputs)
        return {
            "first row": f"größe: {outputs[0].item():.3f}",
            "a/cat": torch.from_numpy(PICTURE),
            "gray": PICTURE[:, :, 1],
        }

    keep = Keep()
    data = tiny.dataset(7)
    run = trainer(
        LogSamples(fn), GradientAccumulation(steps=2), sinks=[keep], eval_fn=eval_loss,
        run_dir=folder / "run",
    )  # fmt: skip
    sets = {"one": data, "two": tiny.dataset(3)}
    run.fit(data, batch_size=4, epochs=2, eval_set=sets)
    shown = [(r.step, r.sample.name, r.text, r.sample.image) for r in keep.reports if r.sample]
    kinds = [r.kind for r in keep.reports if r.kind in ("sample", "eval")]
    # Every second evaluation, from the first on; without a folder; and none outside of fit.
    rarely = Keep()
    run = trainer(LogSamples(fn, every=2), sinks=[rarely], eval_fn=eval_loss)
    run.fit(data, batch_size=4, epochs=3, eval_set=data, eval_first=True)
    run.evaluate(data, batch_size=4)
    steps = sorted({r.step for r in rarely.reports if r.sample})
    wrong = []
    for returned in ("text", {"x": torch.zeros(3, 4, 4)}, {"x": np.zeros((0, 3), np.uint8)}):
        run = trainer(LogSamples(lambda outputs, batch, value=returned: value))
        wrong.append(refused(run.fit, data, batch_size=4, epochs=1, eval_set=data))
    return world.rank, calls, shown, kinds, steps, wrong


def test_log_samples_counts_evaluations_over_a_resume(tmp_path):
    for epochs in (1, 3):
        looks = LogSamples(lambda outputs, batch: {"words": "some"}, every=2)
        run = trainer(looks, Checkpoint(), run_dir=tmp_path)
        run.fit(tiny.dataset(8), batch_size=4, epochs=epochs, eval_set=tiny.dataset(8))
    # The first and the third: two steps each.
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        "step-00000002",
        "step-00000006",
    ]


def test_log_samples(watched):
    world_size, results = watched.world_size, watched.of("samples")
    _, calls, shown, kinds, steps, wrong = results[0]
    x = tiny.dataset(7).tensors[0][:, 0].tolist()
    # Rank 0's share of the first four, and of that the first of two micro-batches.
    first = x[: 4 // world_size // 2]
    second = x[: 4 // world_size]
    assert calls == [first, first, second, second]
    assert kinds == ["sample", "sample", "sample", "eval"] * 2
    assert [(step, name) for step, name, _, _ in shown] == [
        (step, name) for step in (2, 4) for name in ("first row", "a/cat", "gray")
    ]
    text = f"größe: {x[0]:.3f}"
    assert [shown[0][2], shown[0][3], shown[1][2]] == [text, None, ""]
    np.testing.assert_array_equal(shown[1][3], PICTURE)
    assert steps == [0, 4]
    # The other ranks never call it, and show nothing.
    assert all((calls, shown) == ([], []) for _, calls, shown, *_ in results[1:])

    folder = watched.folder / "samples" / "run" / "samples"
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*")) == [
        f"step-0000000{step}/{name}"
        for step in (2, 4)
        for name in ("a%2Fcat.png", "first row.txt", "gray.png")
    ]
    assert (folder / "step-00000002" / "first row.txt").read_text(encoding="utf-8") == text
    for name, pixels in (("a%2Fcat", PICTURE), ("gray", PICTURE[:, :, 1])):
        with Image.open(folder / "step-00000004" / f"{name}.png") as image:
            np.testing.assert_array_equal(np.asarray(image), pixels)

    assert [kind for kind, _ in wrong] == ["ConfigError"] * 3
    assert wrong[0][1] == "LogSamples: fn returned str, not a dict"
    assert "'x' is float32 of shape [3, 4, 4]; a picture is uint8" in wrong[1][1]
    for _, _, _, _, _, remote in results[1:]:
        assert [kind for kind, _ in remote] == ["RemoteError"] * 3
        assert "rank 0 on " in remote[0][1]
        assert "failed in on_eval_batch" in remote[0][1]


def test_log_samples_refuses_what_cannot_work():
    with pytest.raises(ConfigError, match="must be a function"):
        LogSamples("x")
    for every in (0, True, "epoch"):
        with pytest.raises(ConfigError, match=r"^LogSamples\(every="):
            LogSamples(len, every=every)
