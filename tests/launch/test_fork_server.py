"""What a trial's ranks are forked from: no rank could tell, or it is not forked from there."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch

import dtrain
from dtrain.trials.check_trial import Setup
from dtrain.trials.fork_server import FAILED, NEVER_FIT, Order, command, first_imports
from dtrain.trials.launcher import Launcher

#: Tells what a process has that a script finds at its start.
SCRIPT = """
import json
import os
import random
import sys

import numpy as np
import torch
{imports}
main = sys.modules["__main__"]
handles = [name for name in os.listdir("/proc/self/fd") if os.path.exists("/proc/self/fd/" + name)]
told = {{
    "pid": os.getpid(),
    "imported by": {package}.pid,
    "module": [__name__, main.__file__, vars(main) is globals()],
    "argv": sys.argv[1:],
    "beside": os.path.samefile(sys.path[0], os.path.dirname(__file__)),
    "rank": os.environ.get("RANK"),
    "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
    "handles": sorted(handles),
    "drawn": [random.random(), np.random.rand(), torch.rand(()).item()],
    "dtype": str(torch.get_default_dtype()),
    "forked": "start(" not in sys.orig_argv[-1],
    "sums": [np.linalg.inv(np.eye(99)).sum(), torch.ones(200, 200).mm(torch.eye(200)).sum().item()],
    "seen": getattr({package}, "seen", None),
}}
print(json.dumps(told))
"""

PACKAGES = {
    "calm": "",
    "reads_rank": "seen = os.environ.get('RANK')",
    "reads_all": "seen = dict(os.environ).get('RANK')",
    "reads_mark": "seen = os.environ.get('MARK')",
    "starts_a_thread": (
        "import threading; threading.Thread(target=threading.Event().wait, daemon=True).start()"
    ),
    "opens_a_file": "file = open(__file__)",
    "seeds": "import torch; torch.manual_seed(1)",
    "draws": "import numpy; numpy.random.rand()",
    "opens_cuda": "import torch; torch.cuda._is_in_bad_fork = lambda: True",
    "reads_arguments": "import sys; seen = sys.argv[1:]",
    "leaves": "raise SystemExit('planted')",
    "hangs": "import threading; threading.Event().wait()",
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Launches a script that imports a package which is installed beside torch."""
    folder = tmp_path_factory.mktemp("scripts")
    (folder / "site-packages").mkdir()
    for name, text in PACKAGES.items():
        path = folder / "site-packages" / f"{name}.py"
        path.write_text(f"import os\npid = os.getpid()\n{text}\n")
    with pytest.MonkeyPatch.context() as patch:
        paths = [str(folder / "site-packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        patch.setenv("OMP_NUM_THREADS", "2")  # numpy's OpenBLAS starts threads as it is imported
        with Launcher(most_ranks=2) as launcher:

            def launch(package, ranks=1, *, before="", double=True, size="tiny", timeout_s=60):
                script = folder / f"{package}_{len(before)}.py"
                imports = f"{before}\nimport {package}"
                script.write_text(SCRIPT.format(imports=imports, package=package))
                setup = Setup(ranks, 1, 1, double=double)
                done = launcher.launch(setup, ranks, script, ["--size", size], timeout_s)
                texts = [(done.folder / f"rank-{r}.txt").read_text() for r in range(ranks)]
                return done.codes, texts

            yield launch, launcher


def test_a_fork_is_as_a_script_finds_itself(launched):
    launch, _ = launched
    told = []
    for ranks in (1, 1, 2):
        codes, texts = launch("calm", ranks)
        assert codes == (NEVER_FIT,) * ranks, texts
        told += map(json.loads, texts)
    assert len({one["imported by"] for one in told} - {one["pid"] for one in told}) == 1  # once
    assert [one["rank"] for one in told] == [None, None, "0", "1"]
    devices = os.environ.get("CUDA_VISIBLE_DEVICES") if torch.cuda.device_count() > 1 else ""
    for one in told:
        assert one["devices"] == devices  # a card for each rank, or none
        assert one["module"][::2] == ["__main__", True]
        assert one["module"][1].endswith("calm_0.py")
        assert (one["argv"], one["beside"]) == (["--size", "tiny"], True)
        assert one["handles"] == ["0", "1", "2"]
        assert (one["dtype"], one["forked"], one["sums"]) == ("torch.float64", True, [99, 40000])
    for numbers in zip(*(one["drawn"] for one in told), strict=True):
        assert len(set(numbers)) == len(told)  # each rank of each launch draws others


def test_another_dtype_has_imports_of_its_own(launched):
    launch, _ = launched
    once = [json.loads(launch("calm", double=double)[1][0]) for double in (True, False, False)]
    assert [one["dtype"] for one in once] == ["torch.float64", "torch.float32", "torch.float32"]
    importers = [one["imported by"] for one in once]
    assert importers[0] != importers[1] == importers[2]


@pytest.mark.parametrize("package", ["calm", "reads_arguments"])
def test_other_arguments_have_imports_of_their_own_if_these_look(launched, package):
    launch, _ = launched
    sizes = ("small", "large", "large")
    once = [json.loads(launch(package, size=size)[1][0]) for size in sizes]
    assert [one["argv"] for one in once] == [["--size", size] for size in sizes]
    importers = [one["imported by"] for one in once]
    if package == "calm":
        assert importers[0] == importers[1] == importers[2]
    else:
        assert importers[0] != importers[1] == importers[2]
        assert [one["seen"] for one in once] == [one["argv"] for one in once]


@pytest.mark.parametrize(
    ("package", "why"),
    [
        ("reads_rank", "that reads the environment's RANK"),
        ("reads_all", "that reads the environment's all variables"),
        ("starts_a_thread", "it runs 2 threads"),
        ("opens_a_file", "it opens /"),
        ("seeds", "that seeds a global random stream, or draws from one"),
        ("draws", "that seeds a global random stream, or draws from one"),
        ("opens_cuda", "CUDA has been opened"),
    ],
)
def test_what_a_rank_could_tell_is_imported_by_each(launched, package, why):
    launch, launcher = launched
    for ranks in (1, 2):
        codes, texts = launch(package, ranks)
        assert codes == (NEVER_FIT,) * ranks, texts
        for one in map(json.loads, texts):
            assert one["imported by"] == one["pid"]
            assert one["seen"] is None or one["seen"] == one["rank"]
            assert one["forked"]
    log = (launcher.folder / "fork-server.txt").read_text()
    assert log.count(f"/{package}_0.py is not imported ahead: {why}") == 1


def test_what_a_script_sets_before_it_imports_is_seen(launched):
    launch, _ = launched
    _, (text,) = launch("reads_mark", before="os.environ['MARK'] = 'set'")
    one = json.loads(text)
    assert (one["seen"], one["imported by"]) == ("set", one["pid"])


def test_an_import_that_fails_does_so_in_the_rank(launched):
    launch, _ = launched
    for _ in range(2):
        assert launch("leaves") == ((FAILED,), ["the script left with 'planted'\n"])


def test_an_import_that_hangs_is_stopped(launched):
    launch, _ = launched
    codes, (text,) = launch("hangs", timeout_s=1)
    assert codes == (-signal.SIGKILL,)
    assert "hangs.py" in text  # where it was


def test_an_import_ends_with_who_asked_for_it(tmp_path):
    (tmp_path / "site-packages").mkdir()
    os.mkfifo(tmp_path / "pipe")
    text = f"pipe = open({str(tmp_path / 'pipe')!r}, 'w')\n{PACKAGES['hangs']}\n"
    (tmp_path / "site-packages" / "hangs.py").write_text(text)
    (tmp_path / "script.py").write_text("import hangs\n")
    setup, folder, script = asdict(Setup(1, 1, 1)), str(tmp_path), str(tmp_path / "script.py")
    order = Order(Setup.__module__, setup, False, folder, script, [], [{}], timeout_s=60)
    paths = [str(tmp_path / "site-packages"), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        command("serve", 1),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)},
        text=True,
    ) as server:
        server.stdin.write(json.dumps(asdict(order)) + "\n")
        server.stdin.flush()
        with (tmp_path / "pipe").open() as pipe:  # once it is imported
            assert not (tmp_path / "rank-0.txt").exists()  # by an heir
            server.stdin.close()
            pipe.read()  # until that is gone
        assert server.wait(60) == 0


@pytest.mark.slow
def test_where_no_fork_is_right_each_rank_is_started_afresh(tmp_path, monkeypatch):
    (tmp_path / "sitecustomize.py").write_text(PACKAGES["starts_a_thread"])
    (tmp_path / "calm.py").write_text("pid = None")
    (tmp_path / "script.py").write_text(SCRIPT.format(imports="import calm", package="calm"))
    paths = [str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    with Launcher(most_ranks=1) as launcher:
        done = launcher.launch(Setup(1, 1, 1), 1, tmp_path / "script.py", ["one"], 60)
        log = (launcher.folder / "fork-server.txt").read_text()
    assert log == "each rank is started afresh: it runs 2 threads\n"
    assert done.codes == (NEVER_FIT,)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ('"""What."""\nimport os, sys\nfrom torch import nn\nx = 1\nimport json\n', 2),
        ("import os\nimport mine\nimport json\n", 1),
        ("from . import mine\n", 0),
        ("try:\n    import json\nexcept ImportError:\n    pass\n", 0),
        ("import os\nthis is no Python\n", 0),
    ],
)
def test_only_what_nothing_comes_before_is_a_first_import(tmp_path, text, kept):
    (tmp_path / "script.py").write_text(text)
    assert len(first_imports(str(tmp_path / "script.py")).body) == kept
    assert first_imports(str(tmp_path / "nowhere.py")).body == []


def test_the_command_starts_before_torch_is_imported():
    words = "import dtrain, dtrain.cli, dtrain.trials, sys; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", words], check=True)
    with pytest.raises(AttributeError, match="'dtrain' has no attribute 'nowhere'"):
        dtrain.nowhere  # noqa: B018
    assert {"Trainer", "callbacks", "trainer", "__version__"} <= set(dir(dtrain))
    assert dtrain.loop.__name__ == "dtrain.loop"
