"""Mutation testing: changes one small thing of the source at a time, and sees whether a test fails.

    python tools/mutate.py --number 200 --seed 0            # drawn at random over the core
    python tools/mutate.py --only dtrain/step/lane.py       # every mutant of one module
    python tools/mutate.py --number 50 --list               # what would be tried

A mutant is a comparison turned round, `and` for `or`, a condition negated, a number one larger, a
sign changed, `min` for `max`, a statement or a result left out. It is killed if one of the tests
of its room fails (TESTS below) or takes far too long. What survives is printed with its line: a
test is missing, or the line does not matter. Works on copies; the checkout is not touched.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).resolve().parents[1]

#: The tests of each part of the core, of the first that a path begins with; quick ones first. All
#: of `COMMON` come after them.
COMMON = ["tests/ranks/test_one_line_changed.py", "tests/ranks/test_alike.py"]
_AVERAGES = ["test_averages", "test_weights_that_count"]
_GUARDS = ["test_callback", "test_guards", "test_nothing_in_silence"]
_REGULAR = ["test_regularisation", "test_words"]
TESTS = {
    "dtrain/loop.py": [
        *("test_votes", "test_going_on", "test_figures", "test_resume", "test_ending"),
        *("test_streams", "test_emergency", "test_caught", "test_delay", "test_what_is_saved"),
    ],
    "dtrain/step/parameters": ["test_parameters", "test_delay"],
    "dtrain/step/stand_in": ["test_weights_that_count", "test_averages"],
    "dtrain/step/modes": ["test_global_state", "test_regularisation"],
    "dtrain/step/figures": [
        *("test_figures", "test_metrics", "test_nothing_in_silence", "test_guards"),
    ],
    "dtrain/metrics/outputs": ["test_outputs", "test_predict"],
    "dtrain/inference/": ["test_predict", "test_outputs"],
    "dtrain/tuning/": ["test_tuning"],
    "dtrain/callbacks/eval_outputs": ["test_outputs"],
    "dtrain/step/loss_forms": ["test_words", "test_bad_input", "test_outputs"],
    "dtrain/step/evaluation": [
        *(
            "test_outputs",
            "test_figures",
            "test_global_state",
            "test_metric_objects",
            "test_gathers",
        ),
        *("test_data_in_fit", "test_words"),
    ],
    "dtrain/step/gather": ["test_gathers"],
    "dtrain/step/device_lane": ["test_device_lane", "test_guards_ahead", "test_delay"],
    "dtrain/step/gradients": [
        *("test_gradients", "test_device_path", "test_guards_ahead", "test_ddp_gradients"),
    ],
    "dtrain/step/graph": ["test_graph"],
    "dtrain/step/loss_words": ["test_words"],
    "dtrain/step/taking": ["test_words", "test_parameters", "test_weights_that_count"],
    "dtrain/step/precision": [
        "test_precision",
        "test_nothing_in_silence",
        "test_votes",
        "test_delay",
    ],
    "dtrain/step/": [
        *("test_lane", "test_precision", "test_words", "test_parameters", "test_votes"),
        *("test_flat", "test_delay", "test_lane_cases", "test_caught", "test_bad_input"),
    ],
    "dtrain/strategies/": [
        *("test_flat", "test_parameters", "test_ddp_gradients", "test_words", "test_bad_input"),
    ],
    "dtrain/distributed/comm": ["test_comm", "test_caught", "test_bad_input"],
    "dtrain/distributed/exchange": ["test_comm", "test_caught", "test_bad_input"],
    "dtrain/distributed/replicas": ["test_replicas", "test_nothing_in_silence", "test_parameters"],
    "dtrain/checkpoint/optimizer_state": ["test_going_on", "test_older_runs"],
    "dtrain/checkpoint/weights": ["test_load_model", "test_weights_that_count"],
    "dtrain/checkpoint/": [
        *("test_format", "test_status", "test_run_lock", "test_resume_decision", "test_load_model"),
        *("test_going_on", "test_saver", "test_weights_that_count", "test_nothing_in_silence"),
        *("test_resume", "test_what_is_saved", "test_crash_loop", "test_emergency"),
    ],
    "dtrain/data/counting": ["test_counting", "test_data_in_fit", "test_streams"],
    "dtrain/data/": [
        *("test_order", "test_order_checks", "test_shares", "test_data", "test_batch"),
        *("test_predict", "test_outputs"),
        *("test_streams", "test_live_data", "test_data_in_fit", "test_words"),
    ],
    "dtrain/callbacks/lr_schedule": ["test_schedules", "test_schedules_go_on", "test_figures"],
    "dtrain/callbacks/schedulers": ["test_schedules", "test_schedules_go_on"],
    "dtrain/callbacks/param_schedule": ["test_param_schedule"],
    "dtrain/callbacks/averaged_weights": _AVERAGES,
    "dtrain/callbacks/ema": _AVERAGES,
    "dtrain/callbacks/stochastic_weight": _AVERAGES,
    "dtrain/callbacks/early_stopping": [*_AVERAGES, "test_votes", "test_figures", "test_going_on"],
    "dtrain/callbacks/checkpoint": ["test_figures", "test_what_is_saved", "test_saver"],
    "dtrain/callbacks/clip": ["test_votes", "test_flat", "test_words", "test_ddp_gradients"],
    "dtrain/callbacks/gradient_acc": ["test_callback", "test_live_data", "test_flat"],
    "dtrain/callbacks/gradient_stats": ["test_callback", "test_watching", "test_words"],
    "dtrain/callbacks/gradient_noise": _REGULAR,
    "dtrain/callbacks/freeze": ["test_regularisation", "test_flat"],
    "dtrain/callbacks/l1": _REGULAR,
    "dtrain/callbacks/label": _REGULAR,
    "dtrain/callbacks/mixup": _REGULAR,
    "dtrain/callbacks/targets": _REGULAR,
    "dtrain/callbacks/mixed": ["test_precision", "test_callback", "test_guards"],
    "dtrain/callbacks/log_samples": ["test_watching"],
    "dtrain/callbacks/profile": ["test_watching"],
    "dtrain/callbacks/throughput": ["test_watching"],
    "dtrain/callbacks/": [*_GUARDS, "test_figures", "test_words", "test_watching"],
}
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
SIGNS: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "/",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


@dataclass(frozen=True)
class Mutant:
    """One change: ``new`` in place of what stands between two offsets of a file."""

    file: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def __str__(self) -> str:
        old, new = (" ".join(text.split()) for text in (self.old, self.new))
        return f"{self.file}:{self.line}: {old} -> {new}"


def mutants_of(file: str) -> Iterator[Mutant]:
    """Yields every mutant of a module."""
    source = (ROOT / file).read_text(encoding="utf-8")
    starts = [0]
    for text in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(text.encode()))
    raw = source.encode()

    def change(node: ast.AST, new: str) -> Mutant:
        assert isinstance(node, ast.expr | ast.stmt)
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        start = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset
        return Mutant(file, node.lineno, start, end, raw[start:end].decode(), new)

    for node in _code(ast.parse(source)):
        text = ast.unparse(node) if isinstance(node, ast.expr) else ""
        match node:
            case ast.Compare(left, [op], [right]):
                new = f"{ast.unparse(left)} {COMPARISONS[type(op)]} {ast.unparse(right)}"
                yield change(node, f"({new})")
            case ast.BoolOp(op, values):
                word = " or " if isinstance(op, ast.And) else " and "
                yield change(node, "(" + word.join(f"({ast.unparse(v)})" for v in values) + ")")
            case ast.UnaryOp(ast.Not(), operand):
                yield change(node, f"({ast.unparse(operand)})")
            case ast.BinOp(left, op, right) if type(op) in SIGNS:
                new = f"{ast.unparse(left)} {SIGNS[type(op)]} {ast.unparse(right)}"
                yield change(node, f"({new})")
            case ast.Constant(bool()):
                yield change(node, str(not node.value))
            case ast.Constant(int() | float()):
                yield change(node, f"({text} + 1)")
            case ast.Call(ast.Name(name)) if name in NAMES:
                yield change(node.func, NAMES[name])
            case ast.If(test):
                yield change(test, f"(not ({ast.unparse(test)}))")
            case ast.Expr(ast.Call()) | ast.AugAssign() | ast.Assign([ast.Attribute()]):
                yield change(node, "pass")
            case ast.Return(value) if value is not None and not isinstance(value, ast.Constant):
                yield change(node, "return None")


def _code(tree: ast.AST) -> Iterator[ast.AST]:
    """Yields what is executed and decides something: no annotations, no texts of errors."""
    for field, value in ast.iter_fields(tree):
        if field in ("annotation", "returns", "type_comment", "decorator_list", "bases"):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr):
                continue
            if isinstance(node, ast.AST):
                yield node
                yield from _code(node)


def tests_of(file: str) -> list[str]:
    """Returns the files of tests that ought to notice, quick ones first."""
    names = next((names for part, names in TESTS.items() if file.startswith(part)), None)
    if names is None:
        raise SystemExit(f"{file}: no tests are named for it in tools/mutate.py")
    found = [f"tests/{kind}/{name}.py" for kind in ("unit", "ranks") for name in names]
    return [*dict.fromkeys(path for path in [*found, *COMMON] if (ROOT / path).exists())]


def run(mutant: Mutant | None, file: str, copy: Path, timeout_s: float) -> bool:
    """Says whether the tests of ``file`` still pass in ``copy``, with the mutant in it."""
    target = copy / file
    if mutant is not None:
        raw = (ROOT / file).read_bytes()
        target.write_bytes(raw[: mutant.start] + mutant.new.encode() + raw[mutant.end :])
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "not slow", *tests_of(file)]
    command += ["-p", "no:cacheprovider"]
    environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command,
        cwd=copy,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        return process.wait(timeout_s) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
        shutil.copyfile(ROOT / file, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--number", type=int, help="how many to draw; all if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", action="append", help="a module, or what its path begins with")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each")
    parser.add_argument(
        "--trust", action="store_true", help="the tests are known to pass as it is: not run first"
    )
    parser.add_argument("--list", action="store_true", help="only name them")
    asked = parser.parse_args()

    parts = tuple(asked.only or TESTS)
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "dtrain").rglob("*.py"))
    every = [m for file in files if file.startswith(parts) for m in mutants_of(file)]
    drawn = every
    if asked.number is not None and asked.number < len(every):
        drawn = random.Random(asked.seed).sample(every, asked.number)
    print(f"{len(drawn)} of {len(every)} mutants (seed {asked.seed})", flush=True)
    if asked.list:
        print("\n".join(map(str, drawn)))
        return
    survivors: list[Mutant] = []
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(asked.jobs) as pool:
        copies: Queue[Path] = Queue()
        for number in range(asked.jobs):
            copy = Path(temporary) / str(number)
            ignored = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "scratch")
            shutil.copytree(ROOT, copy, ignore=ignored)
            copies.put(copy)

        def judge(mutant: Mutant | None, file: str) -> bool:
            copy = copies.get()
            try:
                return run(mutant, file, copy, asked.timeout)
            finally:
                copies.put(copy)

        # A test that fails anyway would kill everything.
        by_tests = {tuple(tests_of(m.file)): m.file for m in drawn if not asked.trust}
        for file, passes in zip(
            by_tests.values(), pool.map(lambda f: judge(None, f), by_tests.values()), strict=True
        ):
            if not passes:
                raise SystemExit(f"the tests of {file} fail as it is: {' '.join(tests_of(file))}")
        results = pool.map(lambda mutant: judge(mutant, mutant.file), drawn)
        for number, (mutant, survived) in enumerate(zip(drawn, results, strict=True), 1):
            if survived:
                survivors.append(mutant)
            print(
                f"{number}/{len(drawn)} {'SURVIVED' if survived else 'killed'} {mutant}", flush=True
            )
    killed = len(drawn) - len(survivors)
    print(
        f"\nkilled {killed} of {len(drawn)} ({100 * killed / max(1, len(drawn)):.0f} %); survivors:"
    )
    print("\n".join(map(str, survivors)) or "none")


if __name__ == "__main__":
    main()
