"""Who this rank is, and the only ways to the others."""

from dtrain.distributed.activity import (
    ARRIVAL,
    BACKWARD,
    BETWEEN,
    DATA,
    EVAL_LOSS_FN,
    EVALUATION,
    FIRST_DATA,
    METRICS,
    OWN_BACKWARD,
    SAVING,
    UPDATE,
    Activity,
    Phase,
)
from dtrain.distributed.comm import Comm, Rule
from dtrain.distributed.exchange import digest_of
from dtrain.distributed.processes import (
    Heartbeat,
    Process,
    end_with,
    heartbeat_key,
    look_up,
    stopped_children,
    this_machine,
)
from dtrain.distributed.random_streams import (
    derive_seed,
    random_state,
    random_state_kept,
    random_state_of_host,
    restore_random_state,
    seed_everything,
    seeded_generator,
)
from dtrain.distributed.rendezvous import local_store, serve_store
from dtrain.distributed.replicas import check_same_call, check_same_model, shapes_of, share_buffers
from dtrain.distributed.transport import DataParallel, TransportOp
from dtrain.distributed.world import World, current, inhabited, init, on_main

__all__ = [
    "ARRIVAL",
    "BACKWARD",
    "BETWEEN",
    "DATA",
    "EVALUATION",
    "EVAL_LOSS_FN",
    "FIRST_DATA",
    "METRICS",
    "OWN_BACKWARD",
    "SAVING",
    "UPDATE",
    "Activity",
    "Comm",
    "DataParallel",
    "Heartbeat",
    "Phase",
    "Process",
    "Rule",
    "TransportOp",
    "World",
    "check_same_call",
    "check_same_model",
    "current",
    "derive_seed",
    "digest_of",
    "end_with",
    "heartbeat_key",
    "inhabited",
    "init",
    "local_store",
    "look_up",
    "on_main",
    "random_state",
    "random_state_kept",
    "random_state_of_host",
    "restore_random_state",
    "seed_everything",
    "seeded_generator",
    "serve_store",
    "shapes_of",
    "share_buffers",
    "stopped_children",
    "this_machine",
]
