"""Tensor parallel within sharding: twins compute each batch together, and count once."""

import io
import sys

import pytest
import sharding
import torch
from sharding import WIDTH, distance, loss_fn, whole
from test_fsdp import EXACT, SLOW, Count, Plant, SkipSome, Stream, Weigh, loss_with, moments
from torch import nn

import dtrain
from dtrain.callbacks import EMA, EvalOutputs, GradientNoise, GradientStats, L1L2Penalty
from dtrain.errors import ConfigError
from dtrain.strategies import FSDP
from dtrain.testing import run_outcomes, run_processes


def plan():
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"blocks.*.a": ColwiseParallel(), "blocks.*.b": RowwiseParallel()}


def strategy_of(name, **options):
    return FSDP(tensor=2, plan=plan(), **options) if name == "tensor" else name


def make(drops=0.0, hidden=6):
    """Blocks of an even width; what is dropped, is dropped where all twins have it."""
    torch.manual_seed(1)
    model = sharding.Net()
    for block in model.blocks:
        block.a, block.b = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
    model.head = nn.Sequential(nn.Dropout(drops), model.head)
    model = model.double()
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def trainer(strategy, *, drops=0.0, **more):
    return sharding.trainer(strategy_of(strategy), net=make(drops), **more)


# ------------------------------------------------------------------- the numbers of one process


class Counts(dtrain.Callback):
    """Figures of its own, and a vote by one rank only."""

    def __init__(self, asks):
        self.asks = asks

    def on_batch(self, ctx, step):
        ctx.log("mine/samples", step.samples, "sum")
        ctx.log("mine/largest", float(step.batch[2].max()), "max")

    def on_step_end(self, ctx, step):
        if self.asks and step.number == 7:
            ctx.request.stop("enough")


#: Keyword arguments of a trainer and of ``fit``; and as what the numbers are to be.
CASES = {
    "plain": ({}, {"batch_size": 5}, 1),
    "a batch smaller than the ranks": ({"micros": 2}, {"batch_size": 1}, 1),
    "skips before": ({"skips": "on_batch", "micros": 2}, {"batch_size": 6}, 2),
    "skips after": ({"skips": "on_loss"}, {"batch_size": 6}, 2),
    "streams": ({"stream": True, "micros": 2}, {}, 2),
    "dropout": ({"drops": 0.3}, {"batch_size": 6}, 2),
}


def outputs_of(model, batch):
    found = loss_fn(model, batch)
    return dtrain.Loss(found.mean, weight=found.weight, outputs={"x": batch[2]})


def train(strategy, case):
    world = dtrain.init(seed=0)
    given, fit, _ = CASES[case]
    given = dict(given)
    rank = world.rank // (2 if strategy == "tensor" else 1)
    skips, stream = given.pop("skips", None), given.pop("stream", False)
    asks = case == "plain" and world.rank == world.size - 1
    every = [GradientStats(every=1), EvalOutputs({"sum": lambda out: out["x"].sum()})]
    every += [L1L2Penalty(l1=0.01, l2=0.1), GradientNoise(eta=1e-4), EMA(0.9)]
    every += [Counts(asks), *([SkipSome(skips)] if skips else [])]
    made = trainer(strategy, callbacks=every, eval_fn=outputs_of, **given)
    data = dtrain.Data(Stream(rank)) if stream else sharding.dataset()
    result = made.fit(
        data, **fit, epochs=2, eval_set=dtrain.Data(sharding.dataset(9), 4, shuffle=False)
    )
    rows = made.predict(sharding.dataset(7), batch_size=3, fn=lambda m, b: m(b[0]))
    assert made.evaluate(sharding.dataset(3), batch_size=2)["eval/sum"] == 3
    known = {n: v for n, v in result.metrics.items() if "throughput" not in n}
    return whole(made.model), known, torch.stack(rows), result.steps


def train_all(strategy, cases):
    dtrain.init(seed=0)
    return {case: train(strategy, case) for case in cases}


QUICK = ["plain", "skips after", "streams"]


@pytest.mark.parametrize("cases", [QUICK, pytest.param([*CASES], **SLOW)], ids=["some", "all"])
def test_the_numbers_are_those_of_one_process(cases):
    ranks = run_processes(train_all, 4, "tensor", cases, timeout_s=200)
    for size in (1, 2):
        mine = [case for case in cases if CASES[case][2] == size]
        truth = run_processes(train_all, size, "flat", mine, timeout_s=100)[0] if mine else {}
        for case, (expected, metrics, rows, steps) in truth.items():
            for found, figures, predicted, taken in (one[case] for one in ranks):
                assert taken == steps, case
                assert distance(found, expected) <= EXACT, case
                assert (predicted - rows).abs().max() <= EXACT, case
                assert figures.keys() == metrics.keys(), case
                for name, value in metrics.items():
                    assert figures[name] == pytest.approx(value, rel=1e-11, abs=1e-13), (case, name)
                assert all(torch.equal(t, ranks[0][case][0][n]) for n, t in found.items()), case


# ------------------------------------------------------------------- models that bring a plan


def llama(tied):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=32,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config).double()
    blocks = None if not tied else "LlamaDecoderLayer"
    return model, blocks


def gpt():
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[2] / "examples" / "gpt.py"
    spec = importlib.util.spec_from_file_location("gpt_example", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpt_example"] = module
    spec.loader.exec_module(module)
    torch.manual_seed(1)
    return module.GPT(module.Size(2, 4, 16, 12, 0, 0, 0.0, 0)).double(), module.slices


def language(model, batch):
    ids, number = batch
    given = model(ids)
    logits = getattr(given, "logits", given)[:, :-1]
    weights = (number % 3 + 1).double()[:, None].expand(-1, ids.shape[1] - 1)
    each = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return dtrain.Loss.from_sum((each * weights.flatten()).sum(), weight=weights.sum())


def speak(sharded, names):
    dtrain.init(seed=0)
    generator = torch.Generator().manual_seed(3)
    data = torch.utils.data.TensorDataset(
        torch.randint(32, (13, 8), generator=generator), torch.arange(13)
    )
    found = {}
    for name in names:
        model, how = gpt() if name == "gpt" else llama(name == "tied llama")
        strategy = "flat"
        if sharded:
            plan = how if name == "gpt" else None
            blocks = None if name != "tied llama" else [how]
            strategy = FSDP(tensor=2, plan=plan, blocks=blocks)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        made = sharding.trainer(strategy, net=(model, optimizer), loss=language, micros=2)
        made.fit(data, batch_size=3, epochs=2)
        found[name] = whole(model)
        if sharded:
            sliced = [n for n, p in model.named_parameters() if p.device_mesh.ndim == 2]
            assert len(sliced) == {"llama": 16, "tied llama": 15, "gpt": 16}[name], sliced
    return found


@pytest.mark.parametrize(
    "names", [["llama"], pytest.param(["tied llama", "gpt"], **SLOW)], ids=["llama", "more"]
)
def test_models_are_sliced_by_the_plans_they_bring(names):
    truth = run_processes(speak, 1, False, names)[0]
    for found in run_processes(speak, 4, True, names, timeout_s=100):
        for name, expected in truth.items():
            assert found[name].keys() == expected.keys()
            assert distance(found[name], expected) <= EXACT, name


# ------------------------------------------------------------------- failures


def fail(places):
    """Fails before the model is run, or after it: all go on. Then within it: all are told."""
    world = dtrain.init(seed=0)
    fit = {"batch_size": 5, "max_steps": 5}
    straight = trainer("tensor")
    straight.fit(sharding.dataset(), **fit)
    expected, found = whole(straight.model), []
    for place, ranks, goes_on in places:
        plant = Plant(world.rank in ranks, place, 2, 0)
        made = trainer("tensor", loss=loss_with(plant), callbacks=[plant])
        try:
            made.fit(sharding.dataset(), **fit)
            told = "nothing"
        except Exception as error:
            if not goes_on:
                raise
            told = f"{type(error).__name__}: {error}"
        made.fit(sharding.dataset(), **fit)
        found.append((told, distance(whole(made.model), expected)))
    return found


@pytest.mark.parametrize(
    "places",
    [
        [("on_batch", [1], True)],
        pytest.param([("on_loss", [2], True), ("on_batch", [2, 3], True)], **SLOW),
    ],
)
def test_a_failure_outside_of_the_model_is_agreed_and_fit_goes_on(places):
    for rank, cases in enumerate(run_processes(fail, 4, places, timeout_s=100)):
        for (place, ranks, _), (told, far) in zip(places, cases, strict=True):
            assert far <= EXACT, (place, ranks, rank)
            assert f"planted in {place}" in told or "where one has failed" in told, told
            if rank in ranks:
                assert told.startswith("ValueError"), told


def others(at):
    """Streams by the rank's number, as without twins; an evaluation of such."""
    world = dtrain.init(seed=0)
    data = [sharding.dataset(40)[10 * world.rank + n : 10 * world.rank + n + 2] for n in range(3)]
    made, told = trainer("tensor"), []
    for run in (lambda: made.fit(dtrain.Data(data), epochs=1), lambda: made.evaluate(data)):
        with pytest.raises(Exception, match="has another batch than those that compute") as found:
            run()
        told.append(type(found.value).__name__)
    return told


def test_ranks_that_compute_together_must_have_the_same_batch():
    for told in run_processes(others, 4, None):
        assert {*told} <= {"RankMismatch", "RemoteError"}


@pytest.mark.parametrize(
    ("place", "ranks"),
    [
        ("blocks.1.b", [3]),
        pytest.param("blocks.1.a", [2, 3], **SLOW),
        pytest.param("backward of blocks.1.b", [0], **SLOW),
    ],
)
def test_a_failure_within_the_model_ends_the_job_and_is_named(place, ranks):
    outcomes = run_outcomes(fail, 4, [(place, ranks, False)], timeout_s=40)
    for outcome in outcomes:
        told = f"{outcome.error} {outcome.output}"
        assert f"planted in {place}" in told, told
        assert outcome.rank in ranks or f"rank {ranks[0]}" in told or f"rank {ranks[-1]}" in told


# ------------------------------------------------------------------- checkpoints


def go_on(run_dir, strategy, epochs, stream=False):
    world = dtrain.init(seed=0)
    weigh = Weigh()
    callbacks = [weigh, dtrain.callbacks.Checkpoint(every_epochs=1, keep=9)]
    made = trainer(strategy_of(strategy), callbacks=callbacks, run_dir=run_dir, drops=0.2)
    if stream:
        rank = world.rank // (2 if strategy == "tensor" else 1)
        data = sharding.dataset(40)
        batches = [data[10 * rank + 3 * n : 10 * rank + 3 * n + 2] for n in range(2 + rank)]
        made.fit(dtrain.Data(batches), epochs=epochs)
    else:
        made.fit(sharding.dataset(), batch_size=5, epochs=epochs)
    plain, _ = make()
    dtrain.load_model(run_dir, plain)
    end = whole(made.model), moments(made)
    assert all(torch.equal(p.detach(), end[0][n]) for n, p in plain.named_parameters())
    files = {path.name for path in (run_dir / "checkpoints").glob("*/*")}
    return weigh.begin, end, {name for name in files if not name.startswith("rank-")}


def test_a_run_goes_on_in_one_process_and_back(tmp_path):
    """Dropout is drawn by whose samples they are: as on two ranks."""
    straight = run_processes(go_on, 2, tmp_path / "straight", "flat", 2)[0]
    before = None
    for epochs, (size, strategy) in enumerate([(4, "tensor"), (2, "flat")], 1):
        begin, end, files = run_processes(go_on, size, tmp_path / "run", strategy, epochs)[-1]
        for found, expected in zip(begin, before, strict=True) if before else ():
            assert all(torch.equal(t, expected[n]) for n, t in found.items()), (size, strategy)
        before = end
    assert distance(end[0], straight[1][0]) <= EXACT
    assert distance(end[1], straight[1][1]) <= EXACT
    assert files == straight[2]


@pytest.mark.slow
@pytest.mark.parametrize("stream", [False, True])
def test_a_run_goes_on_through_other_strategies(tmp_path, stream):
    chain = [(4, "tensor"), (1, "flat"), (4, "tensor"), (4, "fsdp"), (2, "flat"), (4, "tensor")]
    if stream:  # each of its ranks has its own
        chain = [(2, "flat"), (4, "tensor"), (2, "fsdp"), (4, "tensor")]
    before = None
    for epochs, (size, strategy) in enumerate(chain, 1):
        ranks = run_processes(go_on, size, tmp_path / "run", strategy, epochs, stream)
        begin, end, _ = ranks[-1]
        for found, expected in zip(begin, before, strict=True) if before else ():
            assert found.keys() == expected.keys()
            assert all(torch.equal(t, expected[n]) for n, t in found.items()), (size, strategy)
        before = end
    if stream:
        straight = run_processes(go_on, 2, tmp_path / "straight", "flat", len(chain), stream)[0]
        assert distance(end[0], straight[1][0]) <= EXACT
        assert distance(end[1], straight[1][1]) <= EXACT


# ------------------------------------------------------------------- what is said, counted, refused


def costs():
    dtrain.init(seed=0)
    count, said = Count(), io.StringIO()
    made = trainer("tensor", callbacks=[count], sinks=[dtrain.sinks.Console(said)])
    made.fit(sharding.dataset(21), batch_size=4, epochs=2)
    return count.found, said.getvalue()


def test_what_a_step_costs():
    ranks = run_processes(costs, 4)
    words = ranks[0][1]
    assert "global batch 4 = 2 (of 2 ranks each) x 1 x 2 samples" in words
    assert "sharded over 2 ranks, in slices over 2 each (tensor parallel): 3 x Block" in words
    for found, _ in ranks:
        # The norm; whether twins come, and have a loss; what they say. Those of layers are torch's.
        plain = {"all_gather_single": 7, "reduce_scatter_single": 4, "all_reduce": 1 + 2 + 1}
        assert len(found) == 10
        assert all(one == plain for one in found), found


def tie(model):
    model.blocks[2].a.weight = model.blocks[0].a.weight


REFUSED = {
    "FSDP(tensor=3) on 4 ranks": {"options": {"tensor": 3}},
    "FSDP(tensor=4) on 4 ranks": {"options": {"tensor": 4}},
    "needs a plan of which modules are sliced": {"options": {"plan": None}},
    "'layers.*.a' names no module": {"plan": {"layers.*.a": "a"}},
    "cannot slice blocks.0.a.weight of the shape [5, 7] evenly": {"hidden": 5},
    "blocks.0.a.weight and blocks.2.a.weight are one parameter (tied), and the plan": {
        "plan": {"blocks.0.a": "a", "blocks.0.b": "b"},
        "change": tie,
        "options": {"blocks": lambda name, module: name == "first"},
    },
}


def refused():
    dtrain.init(seed=0)
    told = {}
    for words, case in REFUSED.items():
        styles = dict(zip("ab", plan().values(), strict=True))
        mine = {name: styles[key] for name, key in case.get("plan", {}).items()} or plan()
        model, _ = make(hidden=case.get("hidden", 6))
        case.get("change", lambda model: None)(model)
        options = {"tensor": 2, "plan": mine} | case.get("options", {})
        try:
            sharding.trainer(
                FSDP(**options), net=(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
            )
            told[words] = "nothing"
        except ConfigError as error:
            told[words] = str(error)
    return told


def test_what_cannot_be_sliced_is_refused_in_words():
    for told in run_processes(refused, 4):
        for words, found in told.items():
            assert words in found, found


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tensor": 0}, "how many ranks, or 1"),
        ({"tensor": True}, "how many ranks, or 1"),
        ({"plan": {}}, "pass tensor=2"),
        ({"tensor": 2, "replicas": 2}, "does not work with replicas yet"),
        ({"tensor": 2, "params": "bf16"}, "does not work with params yet"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        FSDP(**options)
