"""What `accelerate config` wrote, or `accelerate launch` was told, as a strategy of dtrain."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.callback import Callback
from dtrain.errors import ConfigError
from dtrain.step import PrecisionSlot, Strategy
from dtrain.strategies.ddp import DDP
from dtrain.strategies.fsdp import FSDP

_KINDS = ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP")
_SHARDINGS = ("FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD", "HYBRID_SHARD_ZERO2")
#: Options that change no number and need nothing here; with the values that are known.
_FOR_ITSELF = {
    "version": ("1", "2"),
    "backward_prefetch": ("", "backward_pre", "no_prefetch"),
    "backward_prefetch_policy": ("", "backward_pre", "no_prefetch"),  # in older files
    "cpu_ram_efficient_loading": ("", "true", "false"),  # all get rank 0's weights
    "forward_prefetch": ("", "false"),
    "ignored_modules": ("",),
    "limit_all_gathers": ("", "true", "false"),
    "min_num_params": None,  # of another policy than those that are taken
    "state_dict_type": ("", "full_state_dict", "sharded_state_dict"),  # files are dtrain's own
    "sync_module_states": ("", "true", "false"),
    "use_orig_params": ("", "true", "false"),
    "activation_checkpointing_offload": ("", "false"),
}
_READ = (
    *("sharding_strategy", "reshard_after_forward", "offload_params", "auto_wrap_policy"),
    *("transformer_layer_cls_to_wrap", "activation_checkpointing"),
)


@dataclass(frozen=True)
class _Found:
    """What there is, by accelerate's names, in words; of a file, or of the environment."""

    where: str
    kind: str
    precision: str
    fsdp: Mapping[str, str]  # by names without "fsdp_"
    dynamo: Mapping[str, str]
    parallel: Mapping[str, str]
    stage: str  # of DeepSpeed's ZeRO

    def refuse(self, name: str, value: str, why: str) -> ConfigError:
        return ConfigError(f"{self.where} has {name}: {value}, and {why}")


def from_accelerate_config(path: str | Path | None = None) -> Strategy:
    """Returns the strategy that accelerate was configured for: :class:`FSDP`, or :class:`DDP`.

    What it cannot honour is refused, by name and value. FSDP's mixed precision becomes
    ``FSDP(params="bf16")``, which sums in float32; that of DDP is a callback here, which the
    Trainer must then have. How many processes there are is known from who launched them.

    Example::

        # accelerate launch train.py
        trainer = dtrain.Trainer(model, optimizer, loss_fn, strategy=from_accelerate_config())

    Args:
        path: a file that ``accelerate config`` wrote (YAML or JSON). If None, what ``accelerate
            launch`` has told this process; where it was not launched so, accelerate's default file.

    Raises:
        ConfigError: there is no such file, or something in it cannot be honoured.

    Ranks: all, local; each reads the file.
    """
    if path is None and "ACCELERATE_MIXED_PRECISION" in os.environ:
        found = _of_environment(os.environ)
    else:
        found = _of_file(_default_file() if path is None else Path(path).expanduser())
    return _strategy(found)


def _strategy(found: _Found) -> Strategy:
    if found.kind == "DEEPSPEED":
        instead = "FSDP(), which shards as much"
        if found.stage not in ("3", "auto"):
            instead = "strategy='ddp' (or FSDP(), where a model and its moments take too much)"
        raise found.refuse(
            "zero_stage", found.stage, f"dtrain does not run DeepSpeed: use {instead} instead"
        )
    if found.kind not in _KINDS:
        raise found.refuse(
            "distributed_type", found.kind, f"dtrain knows {', '.join(_KINDS)}: use one of these"
        )
    for name, value in found.parallel.items():
        data = name == "dp_shard_size" or (name == "dp_replicate_size" and found.kind == "FSDP")
        if name.endswith("_size") and not data and value not in ("", "0", "1"):
            raise found.refuse(
                f"parallelism_config.{name}",
                value,
                "dtrain does not read that: leave it out",
            )
    if found.precision not in ("no", "bf16", "fp16"):
        raise found.refuse("mixed_precision", found.precision, "dtrain has 'bf16' and 'fp16'")
    compiles = found.dynamo.get("backend", "no") != "no"
    if found.kind == "FSDP" and (made := _sharded(found, compiles)) is not None:
        return made
    if compiles:
        raise found.refuse(
            "dynamo_backend",
            found.dynamo["backend"],
            "a Trainer takes a model that is compiled: `torch.compile(model)`, and 'no' here",
        )
    return DDP() if found.precision == "no" else _Mixed(found)


def _sharded(found: _Found, compiles: bool) -> Strategy | None:
    """Returns FSDP as it was configured; None where nothing is to be sharded."""
    fsdp = found.fsdp
    for name, value in fsdp.items():
        if name in _READ:
            continue
        known = _FOR_ITSELF.get(name, ())
        if known is not None and value.lower() not in known:
            raise found.refuse(f"fsdp_{name}", value, "dtrain has no such option: leave it out")
    sharding = _sharding(found)
    if sharding == "NO_SHARD":
        return None
    if sharding not in _SHARDINGS:
        raise found.refuse("fsdp_sharding_strategy", sharding, f"dtrain knows {_SHARDINGS}")
    policy = fsdp.get("auto_wrap_policy", "").upper()
    if policy not in ("", "NO_WRAP", "TRANSFORMER_BASED_WRAP"):
        raise found.refuse(
            "fsdp_auto_wrap_policy",
            policy,
            "dtrain shards by blocks, not by size: choose TRANSFORMER_BASED_WRAP",
        )
    if found.precision == "fp16":
        raise found.refuse("mixed_precision", "fp16", "FSDP computes in bf16 only: choose 'bf16'")
    classes = [one.strip() for one in fsdp.get("transformer_layer_cls_to_wrap", "").split(",")]
    return FSDP(
        blocks=[one for one in classes if one] or None,
        reshard=sharding in ("FULL_SHARD", "HYBRID_SHARD"),
        params="bf16" if found.precision == "bf16" else None,
        compile=_compiling(found.dynamo) if compiles else False,
        offload=fsdp.get("offload_params", "") == "true",
        checkpoint_activations=fsdp.get("activation_checkpointing", "") == "true",
        replicas="hosts" if sharding.startswith("HYBRID") else _replicas(found),
    )


def _replicas(found: _Found) -> int | None:
    size = found.parallel.get("dp_replicate_size", "")
    return int(size) if size.isdigit() and int(size) > 1 else None


def _sharding(found: _Found) -> str:
    """Returns the sharding strategy by its name, of either version's options."""
    reshard = found.fsdp.get("reshard_after_forward", "").upper()
    given = found.fsdp.get("sharding_strategy", "").upper() or "FULL_SHARD"
    if given.isdigit() and 0 < int(given) <= len(_SHARDINGS):
        given = _SHARDINGS[int(given) - 1]
    if found.fsdp.get("version", "1") == "2" and not given.startswith("HYBRID"):
        return "SHARD_GRAD_OP" if reshard == "FALSE" else "FULL_SHARD"
    # Files of newer ones have the name under the newer option, and the launcher fills in the older.
    return reshard if given == "FULL_SHARD" and reshard in _SHARDINGS else given


def _compiling(dynamo: Mapping[str, str]) -> dict[str, Any]:
    options: dict[str, Any] = {"backend": dynamo["backend"]}
    if dynamo.get("mode", "default") not in ("", "default"):
        options["mode"] = dynamo["mode"]
    options |= {"fullgraph": True} if dynamo.get("use_fullgraph") == "true" else {}
    return options | ({"dynamic": True} if dynamo.get("use_dynamic") == "true" else {})


class _Mixed(DDP):
    """DDP that wants the callback that computes in a lower precision."""

    def __init__(self, found: _Found) -> None:
        super().__init__()
        self._found = found

    def check(self, *, accumulates: bool, callbacks: Sequence[Callback] = ()) -> None:
        super().check(accumulates=accumulates, callbacks=callbacks)
        if not any(isinstance(callback, PrecisionSlot) for callback in callbacks):
            precision = self._found.precision
            raise self._found.refuse(
                "mixed_precision",
                precision,
                "under DDP that is a callback here: pass "
                f"Trainer(callbacks=[dtrain.callbacks.MixedPrecision({precision!r})])",
            )


_Mixed.__name__ = _Mixed.__qualname__ = "DDP"  # what messages say


def _default_file() -> Path:
    """Returns where accelerate keeps its configuration."""
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    home = Path(os.environ.get("HF_HOME", Path(cache) / "huggingface")).expanduser()
    folder = home / "accelerate"
    older = folder / "default_config.json"
    file = folder / "default_config.yaml"
    return older if older.is_file() and not file.is_file() else file


def _of_file(file: Path) -> _Found:
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"accelerate's configuration {file} cannot be read ({error.strerror}): run `accelerate "
            "config`, or pass from_accelerate_config(path)"
        ) from error
    import yaml  # type: ignore[import-untyped]  # accelerate needs it, too

    try:
        held = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"accelerate's configuration {file} cannot be read: {error}") from error
    if not isinstance(held, Mapping) or "distributed_type" not in held:
        raise ConfigError(f"{file} is no configuration of accelerate: it has no distributed_type")
    dynamo = dict(held.get("dynamo_config") or {})
    if "dynamo_backend" in held:  # of older ones
        dynamo.setdefault("dynamo_backend", held["dynamo_backend"])
    deepspeed = held.get("deepspeed_config") or {}
    return _Found(
        f"accelerate's configuration {file}",
        str(held["distributed_type"]),
        _word(held.get("mixed_precision") or ("fp16" if held.get("fp16") else "no")),
        _named(held.get("fsdp_config") or {}, "fsdp_"),
        _named(dynamo, "dynamo_", lower=True),
        _named(held.get("parallelism_config") or {}, "parallelism_config_"),
        str(deepspeed.get("zero_stage", "auto" if "deepspeed_config_file" in deepspeed else 2)),
    )


def _of_environment(variables: Mapping[str, str]) -> _Found:
    uses = {
        kind: variables.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true"
        for kind in ("DEEPSPEED", "MEGATRON_LM", "FSDP")
    }

    def with_prefix(prefix: str) -> dict[str, str]:
        return {n.removeprefix(prefix): v for n, v in variables.items() if n.startswith(prefix)}

    fsdp = _named(with_prefix("FSDP_"), "")
    if "transformer_cls_to_wrap" in fsdp:
        fsdp["transformer_layer_cls_to_wrap"] = fsdp.pop("transformer_cls_to_wrap")
    return _Found(
        "what `accelerate launch` was told",
        next((kind for kind, used in uses.items() if used), "NO"),
        _word(variables["ACCELERATE_MIXED_PRECISION"]),
        fsdp,
        _named(with_prefix("ACCELERATE_DYNAMO_"), "", lower=True),
        _named(with_prefix("PARALLELISM_CONFIG_"), ""),
        variables.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"),
    )


def _named(values: Mapping[str, Any], prefix: str, *, lower: bool = False) -> dict[str, str]:
    """Returns options by names without a prefix, as words."""
    named = {name.lower().removeprefix(prefix): _word(value) for name, value in values.items()}
    return {name: value.lower() if lower else value for name, value in named.items()}


def _word(value: Any) -> str:
    """Returns a value as the launcher would write it; nothing for None."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    said = "" if value is None or value == "None" else str(value)
    return said.lower() if said in ("True", "False") else said
