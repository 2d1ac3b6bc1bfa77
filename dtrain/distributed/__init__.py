"""Who this rank is, and the only ways to the others."""

from dtrain.distributed.activity import (
    ARRIVAL,
    BACKWARD,
    BETWEEN,
    DATA,
    EVAL_LOSS_FN,
    EVALUATION,
    FIRST_DATA,
    GATHERING,
    METRICS,
    OWN_BACKWARD,
    SAVING,
    SCATTERING,
    UPDATE,
    Activity,
    Heartbeat,
    Phase,
    heartbeat_key,
)
from dtrain.distributed.alike import check_same_call, check_same_lines
from dtrain.distributed.comm import Comm, Rule
from dtrain.distributed.exchange import digest_of, raw_bytes
from dtrain.distributed.grid import Grid, Groups, grid_of, hosts_of
from dtrain.distributed.health import examine_job
from dtrain.distributed.health_verdict import Health
from dtrain.distributed.names import load_named, named_parameters, named_state, plain_name
from dtrain.distributed.processes import (
    Process,
    end_process,
    end_with,
    look_up,
    started,
    stopped_children,
    this_machine,
)
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
from dtrain.distributed.rendezvous import local_store, read_all, serve_store
from dtrain.distributed.replicas import (
    Replicas,
    are_equal,
    as_bytes,
    check_same_model,
    digests,
    give_rank_0s,
    not_finite,
    own_memory,
    shapes_of,
    share_buffers,
    some_of,
    tensors_of_state,
)
from dtrain.distributed.sharded import (
    copies_of,
    fill_own_part,
    gathered,
    is_sharded,
    own_part,
    placed_like,
    unsharded,
    version_of,
    whole,
)
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
__all__ += ["GATHERING", "SCATTERING"]
__all__ += ["METRICS", "OWN_BACKWARD", "SAVING", "UPDATE", "Activity", "Heartbeat", "Phase"]
__all__ += ["Comm", "DataParallel", "Rule", "TransportOp", "World", "current", "inhabited", "init"]
__all__ += ["are_equal", "check_same_call", "check_same_model", "digest_of", "on_main", "raw_bytes"]
__all__ += ["Replicas", "as_bytes", "digests", "not_finite", "own_memory", "some_of"]
__all__ += ["heartbeat_key", "launcher_gone", "local_store", "read_all", "serve_store"]
__all__ += ["share_buffers"]
__all__ += ["check_same_lines", "give_rank_0s", "shapes_of", "tensors_of_state"]
__all__ += ["Process", "end_process", "end_with", "look_up", "started", "stopped_children"]
__all__ += ["this_machine"]
__all__ += ["load_named", "named_parameters", "named_state", "plain_name"]
__all__ += ["derive_seed", "random_state", "random_state_kept", "random_state_of_host"]
__all__ += ["StreamsOfFits", "restore_random_state", "seed_everything", "seeded_generator"]
__all__ += ["Health", "examine_job"]
__all__ += ["check_seeded", "init_late", "streams_apart"]
__all__ += ["Grid", "Groups", "copies_of", "fill_own_part", "grid_of", "hosts_of"]
__all__ += ["gathered", "is_sharded", "own_part", "placed_like", "unsharded", "version_of"]
__all__ += ["whole"]
