"""Language models of transformers, and adapters of PEFT: as transformers.Trainer trains them."""

import os
import re
from pathlib import Path

import causal
import pytest
import torch
from causal import BATCH, EPOCHS, dataset, whole

import dtrain
from dtrain.callbacks import Checkpoint
from dtrain.errors import ConfigError, LossError
from dtrain.strategies import FSDP
from dtrain.testing import run_processes

EXACT = 1e-10
# PEFT asks transformers by an older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
SLOW = pytest.mark.slow

# ------------------------------------------------------------------- as transformers.Trainer

QUICK = [("gpt2", {}), ("lora", {"ragged": True, "micros": 2})]
OTHERS = [
    ("llama", {}),
    ("lora", {}),
    ("gpt2", {"ragged": True}),
    ("llama", {"ragged": True, "micros": 2}),
    ("llama", {"micros": 2}),
]


def references(cases, folder):
    """One process, by transformers.Trainer."""
    return [causal.by_transformers(causal.make(kind), folder, **how) for kind, how in cases]


def train(strategy, kind, how):
    trainer = causal.trainer(strategy, causal.make(kind), **how)
    data = dtrain.Data(dataset(ragged=how.get("ragged", False)), BATCH, shuffle=False)
    trainer.fit(data, epochs=EPOCHS)
    return trainer.hooks.callbacks[0].losses, whole(trainer.model)


def of_the_docs(folder):
    """The script of docs/sharded.md; what it saved is what it trained."""
    page = Path(__file__).parents[2] / "docs" / "sharded.md"
    (script,) = re.findall(r"```python\n([^`]*get_peft_model.*?)```", page.read_text(), re.S)
    os.chdir(folder)
    held = {}
    exec(script, held)
    trained, loaded = whole(held["trainer"].model), held["whole"].state_dict()
    assert all(torch.equal(t, loaded[name]) for name, t in trained.items())
    return [path.name for path in Path("runs/adapter").iterdir()] if held["world"].is_main else None


def train_all(cases, folder):
    dtrain.init(seed=0)
    if cases == QUICK:
        assert "adapter_model.safetensors" in (of_the_docs(folder) or "adapter_model.safetensors")
    strategies = ("flat", "ddp", "fsdp")
    return {s: [train(s, kind, how) for kind, how in cases] for s in strategies}


@pytest.mark.parametrize("cases", [QUICK, pytest.param(OTHERS, marks=SLOW)], ids=["some", "others"])
def test_losses_and_weights_are_those_of_transformers_trainer(cases, tmp_path):
    expected = run_processes(references, 1, cases, tmp_path, timeout_s=120)[0]
    for rank in run_processes(train_all, 2, cases, tmp_path, timeout_s=120):
        for strategy, found in rank.items():
            for case, mine, theirs in zip(cases, found, expected, strict=True):
                assert len(mine[0]) == causal.STEPS
                assert mine[0] == pytest.approx(theirs[0], abs=EXACT, rel=0), (strategy, case)
                assert mine[1].keys() == theirs[1].keys()
                for name, value in theirs[1].items():
                    far = (mine[1][name] - value).abs().max().item()
                    assert far <= EXACT, (strategy, case, name, far)


# ------------------------------------------------------------------- what else scripts do with them


def by_tokens(model, batch):
    """Text of one rank is longer than that of the others."""
    ids = batch["input_ids"][:, :3]
    longer = 3 + dtrain.init().rank
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": longer}
    text = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
    return dtrain.Metrics({"first": text[:, 3].double().mean()}, weight=len(ids))


HABITS = [
    "checkpointing",
    "reentrant, of adapters",
    "attention",
    "modules to save",
    "streams",
]


class Ready:
    """A rank's own batches, as tokenizers give them; one of one rank has no label."""

    def __init__(self, rank):
        self.rank = rank

    def __iter__(self):
        from transformers import BatchEncoding, default_data_collator

        rows = dataset(ragged=True)
        for number in range(2 + self.rank):
            batch = default_data_collator(rows[3 * number : 3 * number + 1 + self.rank])
            if self.rank and number == 1:
                batch["labels"].fill_(-100)
            yield BatchEncoding(batch)


def has(habit, strategy):
    rank = dtrain.init(seed=0).rank
    data = dtrain.Data(dataset(ragged=True), BATCH, shuffle=False)
    model = causal.make({"reentrant, of adapters": "lora", "attention": "gpt2"}.get(habit, "llama"))
    eval_fn = None
    if habit == "checkpointing":
        model.config.use_cache = True  # transformers says that it does not go along
        model.activation_checkpointing_enable()
        eval_fn = by_tokens
    if habit == "reentrant, of adapters":
        model.enable_input_require_grads()
        model.activation_checkpointing_enable({"use_reentrant": True})
    if habit == "attention":
        model.set_attn_implementation("eager")
    if habit == "modules to save":
        from peft import LoraConfig, get_peft_model

        options = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "use_dora": True}
        model = get_peft_model(model, LoraConfig(r=3, **options)).double()
    options = {"ragged": True, "eval_fn": eval_fn, "scheduled": False}
    trainer = causal.trainer(strategy, model, **options)
    fit = {"eval_set": data} if eval_fn else {}
    if habit == "streams":
        trainer.fit(dtrain.Data(Ready(rank)), max_steps=5)
    else:
        trainer.fit(data, epochs=1, **fit)
    return trainer.hooks.callbacks[0].losses, trainer.context.metrics, whole(trainer.model)


def refused():
    """What cannot be trained in shards, or not saved from them, and what is said then."""
    dtrain.init(seed=0)
    told = []

    def tries(fn, *kinds):
        try:
            told.append(f"nothing, but {fn()}")
        except kinds as error:
            told.append(str(error))

    made = causal.make("llama", exact=False)
    tries(lambda: causal.trainer("fsdp", made.bfloat16()), ConfigError)
    data = dtrain.Data(dataset(), BATCH)
    trainer = dtrain.Trainer(
        causal.make("llama"), causal.adamw, lambda m, batch: m(**batch), strategy=FSDP(), sinks=[]
    )
    tries(lambda: trainer.fit(data, epochs=1), LossError)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    tries(lambda: trainer.model.generate(input_ids=ids, max_new_tokens=2), ConfigError)
    return told


def have_all(habits):
    dtrain.init(seed=0)
    return [{s: has(h, s) for s in ("flat", "fsdp")} for h in habits], refused()


@SLOW
def test_what_scripts_do_with_them_works_in_shards_or_is_refused():
    for found, told in run_processes(have_all, 2, HABITS, timeout_s=120):
        for habit, both in zip(HABITS, found, strict=True):
            (losses, metrics, end), (expected, figures, weights) = both["fsdp"], both["flat"]
            assert losses == pytest.approx(expected, rel=1e-6 if habit == "attention" else 1e-12)
            assert metrics.get("eval/first") == figures.get("eval/first")
            assert habit != "checkpointing" or "eval/first" in metrics
            if habit != "attention":  # whose softmax is in float32
                for name, value in weights.items():
                    assert (end[name] - value).abs().max() <= EXACT, (habit, name)
        assert "must be all float32 or all float64" in told[0]
        assert "returned CausalLMOutputWithPast" in told[1]
        assert "return its .loss" in told[1]
        assert "was run outside of a training step" in told[2]


# ------------------------------------------------------------------- checkpoints of adapters


def go_on(run_dir, strategy, epochs):
    dtrain.init(seed=0)
    checkpoint = Checkpoint(every_epochs=1, keep=9, trainable_only=True)
    model = causal.make("lora")
    options = {"callbacks": [checkpoint], "scheduled": False, "run_dir": run_dir}
    trainer = causal.trainer(strategy, model, **options)
    trainer.fit(dtrain.Data(dataset(), BATCH), epochs=epochs)
    end = whole(trainer.model)
    fresh = causal.make("lora")
    path = dtrain.load_model(run_dir, fresh, strict=False)
    assert all(torch.equal(p.detach(), end[n]) for n, p in fresh.named_parameters())
    from safetensors.torch import load_file

    files = path.glob("*.safetensors") if path.is_dir() else [path]
    names = {name for file in files for name in load_file(file)}
    return end, {name for name in names if "lora" not in name and "state" not in name}


@SLOW
def test_a_run_that_keeps_adapters_only_goes_on_at_other_numbers_of_ranks(tmp_path):
    straight, _ = run_processes(go_on, 2, tmp_path / "straight", "flat", 3)[0]
    for epochs, size in enumerate((2, 1, 2), 1):
        found, others = run_processes(go_on, size, tmp_path / "run", "fsdp", epochs)[0]
        assert not others
    for name, value in straight.items():
        assert (found[name] - value).abs().max() <= EXACT, name
