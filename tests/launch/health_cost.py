"""What measuring nodes costs a start: dtrain.init on two hosts (network namespaces), on and off.

python tests/launch/health_cost.py            as root
"""

import os
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))
from launch.hosts import Hosts, missing

ROOT = Path(__file__).parents[2]
SCRIPT = """
import time
import accelerate, dtrain, torch  # imports are not measured
dtrain.api
began = time.monotonic()
dtrain.init()
print("seconds", time.monotonic() - began)
"""


def start(hosts, switch):
    """Returns how long dtrain.init takes on the first host."""
    folder = Path(tempfile.mkdtemp())
    (folder / "start.py").write_text(SCRIPT)
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "RANKS": "1"}
    env |= {"NNODES": "2", "RDZV_ENDPOINT": "left:29400", "DTRAIN_HEALTH": switch}
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), str(folder / "start.py")]
    logs = [folder / name for name in hosts.names]
    processes = [
        hosts.start(log.name, command, log=log, cwd=folder, env=env | {"NODE_RANK": str(number)})
        for number, log in enumerate(logs)
    ]
    for process in processes:
        process.wait(60)
    return float(logs[0].read_text().split("seconds")[1])


if __name__ == "__main__":
    if why := missing():
        sys.exit(why)
    with Hosts("left", "right") as hosts:
        took = {switch: [start(hosts, switch) for _ in range(5)] for switch in ("on", "off")}
    for switch, seconds in took.items():
        print(
            f"DTRAIN_HEALTH={switch}: {median(seconds):.2f} s (of 5, {min(seconds):.2f} to "
            f"{max(seconds):.2f})"
        )
