"""What is made within meta_init becomes, bit by bit, what the same lines make without it."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import dtrain
from dtrain import meta
from dtrain.errors import ConfigError
from dtrain.meta import recording


@pytest.fixture(autouse=True, params=["nothing is kept", "little is kept", "all is kept"])
def kept(request, monkeypatch):
    sizes = {"nothing is kept": 0, "little is kept": 2000, "all is kept": 2**30}
    monkeypatch.setattr(recording, "KEPT_BYTES", sizes[request.param])
    monkeypatch.setattr(recording, "SMALL_BYTES", 0)


class Inits(nn.Module):
    """Each way that people fill weights in."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(30, 16, padding_idx=2)
        self.head = nn.Linear(16, 30)
        self.head.weight = self.table.weight
        self.square = nn.Linear(16, 16)
        nn.init.orthogonal_(self.square.weight)  # torch leaves these two out on the meta device
        nn.init.trunc_normal_(self.square.bias, std=0.02)
        self.scaled = nn.Parameter(torch.randn(5, 7) * 0.02)
        self.given = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.rates = [x.item() for x in torch.linspace(0, 0.3, 5)]
        self.twice = nn.Parameter(self.square.weight.detach().clone() * 2)
        self.register_buffer("mask", torch.tril(torch.ones(9, 9)), persistent=False)
        self.turned = nn.Linear(6, 6)
        self.turned.weight.data = torch.rand(6, 6).t()
        self.turned.weight.data[1:3].normal_(0, 0.1)
        with torch.no_grad():
            self.turned.bias.copy_(torch.from_numpy(np.arange(6.0)).float())
        self.norm = nn.BatchNorm1d(8)
        self.gru = nn.GRU(4, 5)
        self.copied = copy.deepcopy(self.gru)
        torch._foreach_mul_([p.data for p in self.copied.parameters()], 0.5)
        self.sparse = nn.Linear(9, 9)
        nn.init.sparse_(self.sparse.weight, 0.3)
        nn.init.kaiming_normal_(self.sparse.weight[2:5].T)
        generator = torch.Generator().manual_seed(5)
        self.own = nn.Parameter(torch.empty(6, 6).normal_(generator=generator))
        self.more = nn.Parameter(torch.randn(4, generator=generator))
        self.listed = nn.Parameter(torch.tensor(self.square.weight.flatten().tolist()))
        self.shared = torch.ones(4, 4)
        self.shared.numpy()[1] = 7.0  # past torch's operations
        self.from_shared = nn.Parameter(self.shared * 2)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        nn.init.eye_(self.frozen.weight)
        self.conv = nn.Conv1d(3, 3, 3)
        nn.init.dirac_(self.conv.weight)
        if self.square.weight.abs().sum() > 0:  # code that looks at values
            self.asked = nn.Parameter(torch.rand(3))
        self.rest = nn.Parameter(torch.empty(4, 3))
        for n in range(4):
            self.rest.data[n].fill_(n)
        self.tail = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
        self.tail.apply(again)


def again(module):
    if isinstance(module, nn.Linear):
        module.weight.data.normal_(mean=0.0, std=0.02)
        module.bias.data.zero_()


def layers():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)


def llama(**more):
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, **heads, **more)
    return transformers.AutoModelForCausalLM.from_config(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, **ends)
    return transformers.GPT2LMHeadModel(config)


MODELS = {
    "inits": Inits,
    "in float64": lambda: Inits().double(),
    "in bfloat16": lambda: Inits().to(torch.bfloat16).eval(),
    "copied layers": layers,
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(30, 30)),
        nn.utils.spectral_norm(nn.Linear(9, 9)),
    ),
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True, dtype=torch.bfloat16),
    "gpt2": gpt2,
}
#: How many parameters are there at once: given as values, looked into, or referred to weakly.
WHOLE = {"inits": 13, "in float64": 9, "in bfloat16": 8}


def all_of(model):
    named = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    return {n: (t.dtype, t.stride(), t.requires_grad, t.detach()) for n, t in named.items()}


@pytest.mark.parametrize("name", MODELS)
def test_it_becomes_what_it_would_have_been(name):
    torch.manual_seed(3)
    expected = MODELS[name]()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    with dtrain.meta_init():
        model = MODELS[name]()
    assert torch.equal(torch.rand(1), drawn)
    every = [*model.parameters()]
    assert sum(not p.is_meta for p in every) <= WHOLE.get(name, 0)
    assert not any(buffer.is_meta for buffer in model.buffers())
    copies = copy.deepcopy(model)
    for made in (model, copies):
        meta.make(made)
        found, wanted = all_of(made), all_of(expected)
        assert found.keys() == wanted.keys()
        for one, (*form, values) in wanted.items():
            assert [*found[one][:3]] == form, one
            assert torch.equal(found[one][3], values), one
        assert len([*made.parameters()]) == len([*expected.parameters()])
    assert all(a is b for a, b in zip(every, model.parameters(), strict=True))


def test_an_attribute_stays():
    with dtrain.meta_init():
        layer = nn.Linear(3, 3)
        layer.weight.no_decay = True
    assert layer.weight.no_decay
    meta.make(layer)
    assert layer.weight.no_decay


AFTERWARDS = {
    "written to": lambda net: nn.init.normal_(net.weight),
    "past autograd": lambda net: net.weight.data.zero_(),
    "given values": lambda net: setattr(net.weight, "data", torch.ones(3, 3)),
    "loaded": lambda net: net.load_state_dict({"weight": torch.ones(3, 3), "bias": torch.ones(3)}),
    "cast": lambda net: net.double(),
    "moved": lambda net: net.to("cpu"),
    "emptied": lambda net: net.to_empty(device="cpu"),
    "run": lambda net: net(torch.ones(1, 3)),
    "looked at": lambda net: net.weight.sum().item(),
}


@pytest.mark.filterwarnings("ignore:for weight. copying")  # torch's own, before the error
@pytest.mark.filterwarnings("ignore:for bias. copying")
@pytest.mark.parametrize("how", AFTERWARDS)
def test_what_comes_too_late_is_an_error(how):
    with dtrain.meta_init():
        net = nn.Linear(3, 3)
    with pytest.raises((ConfigError, RuntimeError), match=r"parameter of dtrain\.meta_init"):
        AFTERWARDS[how](net)


def test_a_write_by_another_name_is_found():
    with dtrain.meta_init():
        net = nn.Linear(3, 3)
    net.state_dict()["weight"].zero_()
    with pytest.raises(ConfigError, match=r"weight was written to after dtrain\.meta_init"):
        meta.make(net)


def test_what_is_not_deterministic_is_named():
    count = [0]

    @torch.library.custom_op("dtrain_tests::count_up", mutates_args={"x"})
    def count_up(x: torch.Tensor) -> None:
        count[0] += 1
        x.fill_(count[0])

    with dtrain.meta_init():
        net = nn.Linear(3, 3, bias=False)
        count_up(net.weight.data)
    with pytest.raises(ConfigError, match=r"count_up.* gave other bits when it was done again"):
        meta.make(net)


def test_one_within_another_is_refused():
    with (
        dtrain.meta_init(),
        pytest.raises(ConfigError, match="in effect already"),
        dtrain.meta_init(),
    ):
        pass


def test_where_making_it_fails_all_that_is_there_is_whole():
    layers = []

    def make_and_fail():
        with dtrain.meta_init():
            layers.extend(nn.Linear(9, 9) for _ in range(3))
            raise ZeroDivisionError

    torch.manual_seed(0)
    with pytest.raises(ZeroDivisionError):
        make_and_fail()
    torch.manual_seed(0)
    for layer in layers:
        assert torch.equal(layer.weight, nn.Linear(9, 9).weight)
