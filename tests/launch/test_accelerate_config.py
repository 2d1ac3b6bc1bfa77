"""What accelerate was configured for becomes dtrain's own strategy, or is refused by name."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

import dtrain
from dtrain.errors import ConfigError
from dtrain.strategies import DDP, FSDP, from_accelerate_config

ROOT = Path(__file__).parents[2]

VERSION_1 = {
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_backward_prefetch": "BACKWARD_PRE",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_forward_prefetch": False,
    "fsdp_offload_params": False,
    "fsdp_sharding_strategy": "FULL_SHARD",
    "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    "fsdp_sync_module_states": True,
    "fsdp_use_orig_params": True,
}
VERSION_2 = {
    "fsdp_activation_checkpointing": False,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_cpu_ram_efficient_loading": True,
    "fsdp_offload_params": False,
    "fsdp_reshard_after_forward": True,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_version": 2,
}
DYNAMO = {"dynamo_backend": "AOT_EAGER", "dynamo_mode": "default", "dynamo_use_dynamic": True}


def written(folder, kind="FSDP", precision="no", json_file=False, **more):
    """Writes a file as `accelerate config` does."""
    config = ClusterConfig(
        compute_environment="LOCAL_MACHINE",
        distributed_type=kind,
        mixed_precision=precision,
        use_cpu=False,
        debug=False,
        num_processes=2,
        **more,
    )
    file = folder / f"default_config.{'json' if json_file else 'yaml'}"
    (config.to_json_file if json_file else config.to_yaml_file)(str(file))
    return file


def environment(file):
    """Returns what `accelerate launch` tells ranks of a file."""
    given = ["--config_file", str(file), "--main_process_port", "0", "train.py"]
    args, *_ = _validate_launch_command(launch_command_parser().parse_args(given))
    return prepare_multi_gpu_env(args)


def options(**changed):
    plain = {"blocks": None, "reshard": True, "params": None, "reduce": None}
    plain |= {"compile": False, "offload": False, "checkpoint_activations": False, "replicas": None}
    plain |= {"tensor": 1, "plan": None}
    return plain | changed


def fsdp(base, **changed):
    return {"fsdp_config": base | {f"fsdp_{name}": value for name, value in changed.items()}}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (fsdp(VERSION_1), options()),
        (fsdp(VERSION_2), options()),
        ({}, options()),
        (fsdp(VERSION_2) | {"json_file": True}, options()),
        (fsdp(VERSION_2, reshard_after_forward=False), options(reshard=False)),
        (fsdp(VERSION_1, sharding_strategy="SHARD_GRAD_OP"), options(reshard=False)),
        (fsdp(VERSION_1, sharding_strategy=2), options(reshard=False)),
        (fsdp(VERSION_1, sharding_strategy="HYBRID_SHARD"), options(replicas="hosts")),
        (fsdp(VERSION_1, sharding_strategy=5), options(replicas="hosts", reshard=False)),
        (
            fsdp(VERSION_2) | {"parallelism_config": {"parallelism_config_dp_replicate_size": 2}},
            options(replicas=2),
        ),
        (
            fsdp(VERSION_1, sharding_strategy=None, reshard_after_forward="SHARD_GRAD_OP"),
            options(reshard=False),
        ),
        (
            fsdp(VERSION_1, transformer_layer_cls_to_wrap="BertLayer, Head"),
            options(blocks=["BertLayer", "Head"]),
        ),
        (fsdp(VERSION_2, offload_params=True), options(offload=True)),
        (fsdp(VERSION_2, activation_checkpointing=True), options(checkpoint_activations=True)),
        (fsdp(VERSION_2) | {"precision": "bf16"}, options(params="bf16")),
        (
            fsdp(VERSION_2) | {"dynamo_config": DYNAMO},
            options(compile={"backend": "aot_eager", "dynamic": True}),
        ),
    ],
)
def test_what_is_sharded_is_as_configured(tmp_path, monkeypatch, given, expected):
    file = written(tmp_path, **given)
    told = from_accelerate_config(file)
    for name, value in environment(file).items():
        monkeypatch.setenv(name, value)
    for made in (told, from_accelerate_config()):
        assert type(made) is FSDP
        assert vars(made._options) == expected


@pytest.mark.parametrize(
    "given",
    [{"kind": "NO"}, {"kind": "MULTI_GPU"}, fsdp(VERSION_1, sharding_strategy="NO_SHARD")],
)
def test_all_else_is_ddp(tmp_path, given):
    assert type(from_accelerate_config(written(tmp_path, **given))) is DDP


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (fsdp(VERSION_1, sharding_strategy="SHARDS"), "fsdp_sharding_strategy: SHARDS, and dtrain"),
        (fsdp(VERSION_1, auto_wrap_policy="SIZE_BASED_WRAP"), "not by size"),
        (fsdp(VERSION_1, forward_prefetch=True), "fsdp_forward_prefetch: true, and dtrain has no"),
        (fsdp(VERSION_1, state_dict_type="LOCAL_STATE_DICT"), "fsdp_state_dict_type: LOCAL_STATE"),
        (fsdp(VERSION_1, backward_prefetch="BACKWARD_POST"), "prefetch: BACKWARD_POST"),
        (fsdp(VERSION_2, ignored_modules="a|b"), r"fsdp_ignored_modules: a\|b"),
        (fsdp(VERSION_2, activation_checkpointing_offload=True), "checkpointing_offload: true"),
        (fsdp(VERSION_2, something_new=3), "fsdp_something_new: 3"),
        (fsdp(VERSION_2) | {"precision": "fp16"}, "mixed_precision: fp16, and FSDP computes in"),
        (fsdp(VERSION_2) | {"precision": "fp8"}, "mixed_precision: fp8"),
        (
            {"kind": "MULTI_GPU", "dynamo_config": DYNAMO},
            r"dynamo_backend: aot_eager, and a Trainer takes a model that is compiled",
        ),
        (
            fsdp(VERSION_2) | {"parallelism_config": {"parallelism_config_cp_size": 2}},
            r"parallelism_config\.cp_size: 2",
        ),
        ({"kind": "MEGATRON_LM"}, "distributed_type: MEGATRON_LM"),
        (
            {"kind": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
            "zero_stage: 2, and dtrain does not run DeepSpeed: use strategy='ddp'",
        ),
        (
            {"kind": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3}},
            r"zero_stage: 3, .*: use FSDP\(\), which",
        ),
        (
            {"kind": "DEEPSPEED", "deepspeed_config": {"deepspeed_config_file": "ds.json"}},
            r"zero_stage: auto, .*: use FSDP\(\), which",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name_and_value(tmp_path, given, words):
    with pytest.raises(ConfigError, match=f"default_config.yaml has .*{words}"):
        from_accelerate_config(written(tmp_path, **given))


def test_a_file_is_looked_for_where_accelerate_keeps_it(tmp_path, monkeypatch):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ConfigError, match=r"accelerate/default_config.yaml cannot be read"):
        from_accelerate_config()
    (tmp_path / "accelerate").mkdir()
    written(tmp_path / "accelerate", json_file=True)
    assert type(from_accelerate_config()) is FSDP
    written(tmp_path / "accelerate", kind="MULTI_GPU")
    assert type(from_accelerate_config()) is DDP
    for text in ("a: [", "- 1"):
        (tmp_path / "wrong.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"cannot be read|is no configuration"):
            from_accelerate_config(tmp_path / "wrong.yaml")


def test_mixed_precision_of_ddp_is_a_callback_that_must_be_there(tmp_path):
    strategy = from_accelerate_config(written(tmp_path, kind="MULTI_GPU", precision="bf16"))
    with pytest.raises(ConfigError, match=r"mixed_precision: bf16, .*MixedPrecision\('bf16'\)"):
        strategy.check(accumulates=False)
    strategy.check(accumulates=False, callbacks=[dtrain.callbacks.MixedPrecision("bf16")])


SCRIPT = """
import json, sys
from pathlib import Path
import torch
import dtrain
from dtrain.strategies import from_accelerate_config

world = dtrain.init(seed=3)
layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.TransformerEncoder(layer, 3))
x = torch.randn(12, 4, 3, generator=torch.Generator().manual_seed(5))
strategy = from_accelerate_config()
trainer = dtrain.Trainer(
    model, torch.optim.SGD(model.parameters(), lr=0.1), lambda m, x: m(x[0]).square().mean(),
    sinks=[], strategy=strategy,
)
result = trainer.fit(torch.utils.data.TensorDataset(x), batch_size=4, epochs=2)
told = [world.size, strategy.describe(), result.metrics["train/loss"]]
Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(told))
"""


@pytest.mark.slow
def test_accelerate_launch_tells_the_ranks(tmp_path):
    """Really launched, on two CPUs, by a file in which most is set."""
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT))
    how = fsdp(
        VERSION_2,
        transformer_layer_cls_to_wrap="TransformerEncoderLayer",
        activation_checkpointing=True,
        offload_params=True,
        reshard_after_forward=False,
    )
    file = written(tmp_path, main_process_port=0, **how)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [*command, "train.py", "."],
        cwd=tmp_path,
        env=env,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert told[0] == told[1]
    assert told[0][0] == 2
    assert "sharded over 2 ranks: 3 x TransformerEncoderLayer" in told[0][1]
    assert "; blocks computed again in backward; offloaded to the host" in told[0][1]
