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
    Heartbeat,
    Phase,
    heartbeat_key,
)
from dtrain.distributed.comm import Comm, Rule
from dtrain.distributed.exchange import digest_of
from dtrain.distributed.processes import Process, end_with, look_up, stopped_children, this_machine
from dtrain.distributed.random_streams import (
    StreamsOfFits,
    derive_seed,
    random_state,
    random_state_kept,
    random_state_of_host,
    restore_random_state,
    seed_everything,
    seeded_generator,
    streams_apart,
)
from dtrain.distributed.rendezvous import local_store, serve_store
from dtrain.distributed.replicas import check_same_call, check_same_model, shapes_of, share_buffers
from dtrain.distributed.transport import DataParallel, TransportOp
from dtrain.distributed.world import (
    World,
    check_seeded,
    current,
    inhabited,
    init,
    init_late,
    launcher_gone,
    on_main,
)

__all__ = ["ARRIVAL", "BACKWARD", "BETWEEN", "DATA", "EVALUATION", "EVAL_LOSS_FN", "FIRST_DATA"]
__all__ += ["METRICS", "OWN_BACKWARD", "SAVING", "UPDATE", "Activity", "Heartbeat", "Phase"]
__all__ += ["Comm", "DataParallel", "Rule", "TransportOp", "World", "current", "inhabited", "init"]
__all__ += ["check_same_call", "check_same_model", "digest_of", "on_main", "shapes_of"]
__all__ += ["heartbeat_key", "launcher_gone", "local_store", "serve_store", "share_buffers"]
__all__ += ["Process", "end_with", "look_up", "stopped_children", "this_machine"]
__all__ += ["derive_seed", "random_state", "random_state_kept", "random_state_of_host"]
__all__ += ["StreamsOfFits", "restore_random_state", "seed_everything", "seeded_generator"]
__all__ += ["check_seeded", "init_late", "streams_apart"]
