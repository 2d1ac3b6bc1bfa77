"""Writes slurm/*.sbatch anew from dtrain/cluster/batch.py, where their text is kept.

python tools/write_sbatch.py
"""

from pathlib import Path
from typing import get_args

from dtrain.cluster.batch import Kind, render

for kind in get_args(Kind):
    path = Path(__file__).parents[1] / "slurm" / f"{kind}.sbatch"
    path.write_text(render(kind))
    path.chmod(0o755)
