"""Models of dtrain.meta_init: the weights of one process, of which a rank holds its rows only."""

import json
import re

import pytest
import safetensors.torch
import sharding
import torch
from sharding import distance, strategy_of, whole

import dtrain
from dtrain.checkpoint.stored import Stored
from dtrain.errors import ConfigError, RankMismatch
from dtrain.meta import recording
from dtrain.testing import run_outcomes, run_processes

EXACT = 1e-12


def make(name, *, later):
    """As a script does; of nothing that is let go of is much kept."""
    recording.KEPT_BYTES = recording.SMALL_BYTES = 0
    if not later:
        torch.manual_seed(1)
        return sharding.MODELS[name]().double()
    torch.manual_seed(1)
    with dtrain.meta_init():
        return sharding.MODELS[name]().double()


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1, fused=True)


def train(strategy, name, later):
    dtrain.init(seed=0)
    model = make(name, later=later)
    drawn = torch.rand(1).item()
    unmade = sum(p.is_meta for p in model.parameters())
    given = adamw if name == "odd" else torch.optim.AdamW(model.parameters(), lr=1e-2)
    trainer = sharding.trainer(strategy_of(strategy), net=(model, given), micros=2)
    before = whole(trainer.model)
    trainer.fit(sharding.dataset(), batch_size=5, epochs=1)
    return before, whole(trainer.model), drawn, unmade


@pytest.mark.parametrize(
    ("size", "strategy", "name"),
    [(2, "fsdp", "odd"), (3, "fsdp", "net"), (2, "flat", "net"), (1, "fsdp", "odd")],
)
def test_the_weights_are_those_of_one_process(size, strategy, name):
    truth = run_processes(train, 1, "flat", name, False)[0]
    for before, end, drawn, unmade in run_processes(train, size, strategy, name, True):
        assert unmade == len(before)
        assert before.keys() == truth[0].keys()
        assert all(torch.equal(t, truth[0][n]) for n, t in before.items())
        assert distance(end, truth[1]) <= EXACT
        assert drawn == truth[2]


def llama(strategy, later):
    """A model of transformers, which has its own loss, and buffers that are computed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    dtrain.init(seed=0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, **heads, tie_word_embeddings=True)
    torch.manual_seed(2)
    if later:
        recording.KEPT_BYTES = 3000
        with dtrain.meta_init():
            model = LlamaForCausalLM(config).double()
    else:
        model = LlamaForCausalLM(config).double()
    trainer = dtrain.Trainer(
        model, adamw, lambda net, batch: net(batch, labels=batch).loss, strategy=strategy, sinks=[]
    )
    tokens = torch.randint(31, (12, 6), generator=torch.Generator().manual_seed(3))
    trainer.fit(tokens, batch_size=4, epochs=1)
    return whole(trainer.model)


def test_a_model_of_transformers_is_trained_as_ever():
    expected = run_processes(llama, 1, "flat", False)[0]
    for found in run_processes(llama, 2, "fsdp", True):
        assert distance(found, expected) <= EXACT


def begin(how):
    rank = dtrain.init(seed=0).rank
    torch.manual_seed(1 + (rank if how == "other seeds" else 0))
    with torch.device("meta") if how == "bare" else dtrain.meta_init():
        net = sharding.Net().double()
    return sharding.trainer("fsdp", net=(net, adamw))


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("other seeds", RankMismatch, "would make other weights, .* blocks.0.a.weight"),
        ("bare", ConfigError, "first.weight, .* are on the meta device, and nothing says what"),
    ],
)
def test_what_cannot_be_made_is_refused_on_all_ranks(how, kind, words):
    for outcome in run_outcomes(begin, 2, how):
        assert isinstance(outcome.error, kind), outcome
        assert re.search(words, str(outcome.error))


def try_again():
    """A Trainer that could not be made, and another, of the same model; optimizers of all kinds."""
    dtrain.init(seed=0)
    expected = {n: p.detach() for n, p in make("net", later=False).named_parameters()}
    found = []
    for strategy in ("ddp", "fsdp"):
        model = make("net", later=True)
        with pytest.raises(ConfigError, match="LBFGS looks at whole parameters"):
            sharding.trainer("fsdp", net=(model, lambda m: torch.optim.LBFGS(m.parameters())))
        with pytest.raises(ConfigError, match=r"parameter of dtrain\.meta_init"):
            model(torch.ones(1, sharding.WIDTH).double())
        adagrad = sharding.trainer(
            strategy, net=(model, lambda m: torch.optim.Adagrad(m.parameters()))
        )
        found.append(whole(adagrad.model))
        adagrad.fit(sharding.dataset(), batch_size=5, max_steps=2)
    return expected, *found


def test_where_a_trainer_is_refused_another_may_take_the_model():
    for expected, *found in run_processes(try_again, 2):
        for one in found:
            assert all(torch.equal(t, expected[n]) for n, t in one.items())


def starting_weights(folder):
    """Loads weights that another run, or another library, has left; each rank reads its rows."""
    dtrain.init(seed=0)
    found = {}
    for name in ("run", "plain", "parts", "run/checkpoints", "run again"):
        model = make("odd", later=True)
        if name == "run again":
            sharding.trainer("fsdp", net=(model, adamw))  # sharded already
        dtrain.load_model(folder / name.replace(" again", ""), model)
        reads.clear()
        if name != "run again":
            assert all(p.is_meta for p in model.parameters())
            sharding.trainer("fsdp", net=(model, adamw))
        found[name] = whole(model), sum(reads)
    return found


reads = []


def counted(part):
    def call(self, at):
        given = part(self, at)
        reads.append(given.nbytes)
        return given

    return call


Stored.part = counted(Stored.part)


def train_plain(run_dir):
    dtrain.init(seed=0)
    callbacks = [dtrain.callbacks.Checkpoint(every_epochs=1)]
    trainer = sharding.trainer("flat", model="odd", run_dir=run_dir, callbacks=callbacks)
    trainer.fit(sharding.dataset(), batch_size=5, epochs=1)
    return whole(trainer.model)


def test_starting_weights_are_read_by_rows(tmp_path):
    expected = run_processes(train_plain, 1, tmp_path / "run")[0]
    for kind in ("plain", "parts"):
        (tmp_path / kind).mkdir()
    safetensors.torch.save_file(expected, tmp_path / "plain" / "model.safetensors")
    names = {n: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, n in enumerate(expected)}
    for file in {*names.values()}:
        held = {n: t for n, t in expected.items() if names[n] == file}
        safetensors.torch.save_file(held, tmp_path / "parts" / file)
    index = json.dumps({"weight_map": names})
    (tmp_path / "parts" / "model.safetensors.index.json").write_text(index)
    ranks = run_processes(starting_weights, 3, tmp_path)
    for name in ranks[0]:
        for found, _ in (rank[name] for rank in ranks):
            assert found.keys() == expected.keys()
            assert all(torch.equal(t, expected[n]) for n, t in found.items()), name
        if name != "run again":
            assert sum(rank[name][1] for rank in ranks) == sum(t.nbytes for t in expected.values())
