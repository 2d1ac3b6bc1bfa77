"""Trainer.predict: an output for each sample, in the dataset's order, equal on all ranks."""

import errno
import io
import multiprocessing
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn

import dtrain
from dtrain.callbacks import EMA, GradientAccumulation, MixedPrecision
from dtrain.inference import parts as parts_of
from dtrain.testing import run_outcomes, run_processes, run_ranks, try_ranks

RANKS = [1, 2, 3, 4]
CASES = [(1, 1), (1, 200), (2, 7), (3, 1), (5, 2), (5, 200), (31, 7), (31, 200)]
X = torch.randn(31, 8, generator=torch.Generator().manual_seed(5))


def trainer(*callbacks, model=None, optimizer=None, loss=tiny.loss_fn):
    return tiny.trainer(callbacks, net=model, optimizer=optimizer, loss=loss)


def told(outcomes):
    """What each rank's error says, with its notes."""
    return [
        " ".join([f"{type(one.error).__name__}: {one.error}", *getattr(one.error, "__notes__", ())])
        for one in outcomes
    ]


def described(model, x):
    """What depends on the sample alone, bit for bit."""
    return {
        "sum": (x * x).sum(-1),
        "pair": (x.bfloat16(), x.double().numpy()),
        "text": [f"{value:.3f}" for value in x[:, 0].tolist()],
    }


def same(found, x):
    assert len(found) == len(x)
    for one, row in zip(found, x, strict=True):
        assert torch.equal(one["sum"], (row * row).sum(-1))
        assert torch.equal(one["pair"][0], row.bfloat16())
        assert np.array_equal(one["pair"][1], row.double().numpy())
        assert one["text"] == f"{row[0].item():.3f}"
    return True


# ------------------------------------------------------------------------------- in memory


def predicted(*callbacks):
    run = trainer(*callbacks)
    return [run.predict(X[:n], batch_size=size, fn=described) for n, size in CASES]


@pytest.mark.parametrize("callbacks", [(), (GradientAccumulation(micro_batch_size=3),)])
@pytest.mark.parametrize("ranks", RANKS)
def test_each_sample_has_one_output_in_order(ranks, callbacks):
    for found in run_ranks(predicted, ranks, *callbacks):
        for (n, _), one in zip(CASES, found, strict=True):
            assert same(one, X[:n])


def logits(*callbacks):
    run = trainer(*callbacks)
    seen = []
    fn = lambda model, x: seen.append(len(x)) or model(x)  # noqa: E731
    return torch.stack(run.predict(X, batch_size=12, fn=fn)), seen


def test_micro_batches_of_one_size_give_the_same_bits():
    by_ranks = [run_ranks(logits, n, GradientAccumulation(micro_batch_size=5)) for n in RANKS]
    assert by_ranks[0][0][1] == [5, 5, 5, 5, 5, 5, 1]
    assert [seen for _, seen in by_ranks[3]] == [[5, 5], [5, 5], [5, 5], [1]]
    for each in by_ranks:
        assert all(torch.equal(found, by_ranks[0][0][0]) for found, _ in each)


def test_a_ranks_micro_batch_is_its_part_of_a_batch():
    assert [seen for _, seen in run_ranks(logits, 3)] == [[4, 4, 4], [4, 4, 4], [4, 3]]


class Texts(torch.utils.data.Dataset):
    def __init__(self, samples):
        self.texts = ["a" * (n % 5 + 1) for n in range(samples)]

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, row):
        return self.texts[row]


def padded(texts):
    longest = max(map(len, texts))
    return torch.tensor([[ord(c) for c in text.ljust(longest)] for text in texts])


def unpadded(model, ids):
    return [row[row != ord(" ")] for row in ids]


def in_orders():
    run = trainer()
    lengths = [n % 5 + 1 for n in range(23)]
    bucketed = dtrain.data.Bucketed(lengths, 6, seed=0)
    data = dtrain.Data(Texts(23), 6, collate_fn=padded, order=bucketed)
    return (
        run.predict(data, fn=unpadded),
        run.predict(dtrain.Data(X, 4, order=[9, 3, 9]), fn=described),
        run.predict(dtrain.Data(X, 4), fn=described),  # its shuffle=True is not meant
        run.predict({"x": X, "n": list(range(31))}, batch_size=4, fn=lambda m, b: (b["n"], b["x"])),
    )


@pytest.mark.parametrize("ranks", RANKS)
def test_orders(ranks):
    for texts, chosen, whole, columns in run_ranks(in_orders, ranks):
        assert [len(one) for one in texts] == [n % 5 + 1 for n in range(23)]
        assert same(chosen, X[[9, 3, 9]])
        assert same(whole, X)
        assert [int(n) for n, _ in columns] == list(range(31))


def of_stream(each):
    run = trainer()
    rank = run.world.rank
    return run.predict([torch.arange(2) + 10 * rank for _ in range(each[rank])], fn=lambda m, b: b)


def test_a_stream_comes_rank_by_rank():
    for found in run_ranks(of_stream, 3, [2, 0, 1]):
        assert [int(one) for one in found] == [0, 1, 0, 1, 20, 21]


class Noisy(nn.Sequential):
    def __init__(self):
        torch.manual_seed(3)
        super().__init__(nn.BatchNorm1d(8), nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 2))


def after_a_fit():
    run = trainer(EMA(0.9), model=Noisy(), optimizer=tiny.adam)
    data = tiny.dataset(32)
    run.fit(data, batch_size=16, epochs=2)
    before = torch.get_rng_state(), [module.training for module in run.model.modules()]
    fn = lambda model, batch: (model(batch[0]), [torch.is_grad_enabled()] * len(batch[0]))  # noqa: E731
    found = run.predict(data, batch_size=16, fn=fn)
    assert not any(grad for _, grad in found)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert [module.training for module in run.model.modules()] == before[1]
    with torch.no_grad():
        wanted = run.model.eval()(data.tensors[0])
    return torch.stack([one for one, _ in found]), wanted


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_is_of_the_model_in_eval_mode(ranks):
    first = None
    for found, wanted in run_ranks(after_a_fit, ranks):
        first = found if first is None else first
        assert torch.equal(found, first)
        assert torch.allclose(found, wanted, atol=1e-6)


class InTheMiddle(dtrain.Callback):
    def on_epoch_end(self, ctx):
        self.found = self.run.predict(X, batch_size=7, fn=described)


def within_a_fit(predicts):
    hook = InTheMiddle()
    run = hook.run = trainer(*[hook] * predicts, optimizer=tiny.adam)
    run.fit(tiny.dataset(32), batch_size=16, epochs=2)
    return tiny.digest(run.model), predicts and same(hook.found, X)


def test_a_prediction_within_a_fit_changes_nothing_of_it():
    with_it, without = run_ranks(within_a_fit, 2, True), run_ranks(within_a_fit, 2, False)
    assert [weights for weights, _ in with_it] == [weights for weights, _ in without]


def with_autocast():
    run = trainer(MixedPrecision("bf16"))
    return run.predict(X, batch_size=7, fn=lambda model, x: model(x))[0].dtype


def test_it_computes_in_the_precision_of_the_training():
    assert run_ranks(with_autocast, 1) == [torch.bfloat16]


def of_the_loss():
    def loss(model, batch):
        return dtrain.Loss(model(batch).mean(), outputs=batch[:, 0])

    return trainer(loss=loss).predict(X, batch_size=7)


def test_without_a_function_it_is_the_outputs_of_the_evaluations():
    for found in run_ranks(of_the_loss, 2):
        assert torch.equal(torch.stack(found), X[:, 0])


def reused():
    """What the function returns is a view of what it writes to again."""
    kept, array = torch.empty(16, 8), np.empty((16, 8))

    def fn(model, x):
        kept[: len(x)] = x
        array[: len(x)] = x
        return kept[: len(x)], array[: len(x)], [*kept[: len(x)]]

    return trainer().predict(X, batch_size=7, fn=fn)


def test_outputs_are_copied():
    for found in run_ranks(reused, 2):
        assert torch.equal(torch.stack([one for one, _, _ in found]), X)
        assert np.array_equal(np.stack([one for _, one, _ in found]), X.double().numpy())
        assert torch.equal(torch.stack([one for _, _, one in found]), X)


# ------------------------------------------------------------------------------- no optimizer


def without_an_optimizer():
    model = tiny.model().requires_grad_(False)
    run = trainer(model=model)
    figures = run.evaluate(tiny.dataset(31), batch_size=7)
    whole = trainer(model=tiny.model(), optimizer=tiny.adam)
    assert figures == whole.evaluate(tiny.dataset(31), batch_size=7)
    assert same(run.predict(X, batch_size=7, fn=described), X)
    with pytest.raises(dtrain.ConfigError) as nothing:
        run.fit(tiny.dataset(), batch_size=8, epochs=1)
    with pytest.raises(dtrain.ConfigError) as stepped:
        run.optimizer.step()
    model.requires_grad_(True)
    run.optimizer = tiny.adam(model)
    result = run.fit(tiny.dataset(), batch_size=8, epochs=1)
    return str(nothing.value), str(stepped.value), result.updates


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_trainer_without_an_optimizer(ranks):
    for fit, step, updates in run_ranks(without_an_optimizer, ranks):
        assert fit == step
        assert "made without an optimizer, Trainer(model, None, ...), and so evaluates and" in fit
        assert updates == 12


def test_a_frozen_model_with_an_optimizer_is_refused_as_ever():
    def run():
        trainer(model=tiny.model().requires_grad_(False), optimizer=tiny.adam)

    for error in told(try_ranks(run, 2)):
        assert "no parameter of the model requires a gradient" in error


# ------------------------------------------------------------------------------- what is refused


def keeps_some(samples):
    kept = [one for one in samples if one[0] > -1]
    return torch.stack(kept) if kept else None


def counted(batch):
    return 0 if batch is None else len(batch)


def raises_on_one(model, x, ctx):
    if int(ctx.rng.initial_seed()) and dtrain.init().rank == 1:
        raise ValueError("torn")
    return x


def predicts(fn, data=X, batch_size=7, **options):
    return lambda: trainer().predict(data, batch_size=batch_size, fn=fn, **options)


USED_UP = iter([])
LACKING = dtrain.Data(X, 7, collate_fn=keeps_some, count=counted)
LEFT = int((X[:, 0] <= -1).sum())
REFUSED = {
    "nothing": (
        predicts(lambda m, x: None),
        "predict: outputs is NoneType: outputs are a ten",
    ),
    "a number": (
        predicts(lambda m, x: x.mean()),
        "outputs is of shape [], for a batch of 4 samp",
    ),
    "rows that lack": (
        predicts(lambda m, x: x[1:]),
        "is of shape [3, 8], for a batch of 4 samp",
    ),
    "no function": (
        predicts(None, tiny.dataset()),
        "evaluation's function returned no outputs: ",
    ),
    "no function, really": (predicts(7), "(that is the `fn` of predict)"),
    "a skip": (predicts(lambda m, x, ctx: ctx.request.skip("no")), "request.skip('no') works in"),
    "no batch size": (predicts(described, batch_size=None), "pass batch_size"),
    "samples left out": (
        predicts(lambda m, x: x, LACKING, None),
        f"DataError: predict: collate_fn has left out {LEFT} of 31 samples, so it is not known",
    ),
    "samples left out of an order": (
        predicts(
            lambda m, x: x,
            dtrain.Data(
                X, 7, collate_fn=keeps_some, count=counted, order=dtrain.data.Shuffled(31, seed=0)
            ),
            None,
        ),
        "samples has",
    ),
    "a generator's second time": (
        lambda: [trainer().predict(USED_UP, fn=described) for _ in range(2)],
        "DataError: predict: no rank's data gave a sample (a generator gives its batches once",
    ),
    "nothing to predict": (predicts(described, X[:0]), "the dataset (Tensor) is empty"),
    "on one rank": (predicts(raises_on_one), "torn"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_told_on_all_ranks(name):
    run, words = REFUSED[name]
    for error in told(try_ranks(run, 2)):
        assert words in error


def differs():
    run = trainer()
    run.predict(X[: 10 + run.world.rank], batch_size=7, fn=described)


def test_ranks_that_are_called_differently():
    for error in told(try_ranks(differs, 2)):
        assert "the ranks called predict with different arguments or data of different" in error
        assert "rank 1: data: 11 samples in batches of 8" in error


def on_rank_0_only(call):
    run = trainer(optimizer=tiny.adam)
    if run.world.rank == 0:
        CALLS[call](run)
    run.fit(tiny.dataset(), batch_size=16, epochs=1)


CALLS = {
    "predict": lambda run: run.predict(X, batch_size=7, fn=described),
    "evaluate": lambda run: run.evaluate(tiny.dataset(), batch_size=16),
    "lr_range_test": lambda run: dtrain.lr_range_test(run, tiny.dataset(), batch_size=16),
    "find_batch_size": lambda run: dtrain.find_batch_size(run, tiny.dataset(), batch_size=16),
}


@pytest.mark.parametrize("call", CALLS)
def test_what_only_some_ranks_call_is_named(call):
    for error in told(try_ranks(on_rank_0_only, 2, call)):
        assert error.startswith("RankMismatch: ranks met in different calls")
        assert f", for {call} at test_predict.py:" in error
        assert ", for fit at test_predict.py:" in error


# ------------------------------------------------------------------------------- in files


def in_files(folder, data, size, part):
    parts_of._PART_SAMPLES = part
    return trainer().predict(data, batch_size=size, fn=described, to=folder)


def read(folder):
    return [*dtrain.load_predictions(folder)]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(parts_of, "_PART_SAMPLES", parts_of._PART_SAMPLES)  # put back


@pytest.mark.parametrize("ranks", RANKS)
def test_parts_follow_one_another(ranks, tmp_path):
    for n, (samples, size, part) in enumerate([(31, 7, 3), (2, 200, 1), (31, 31, 10**6)]):
        folder = tmp_path / f"runs/{n}"
        assert run_ranks(in_files, ranks, folder, X[:samples], size, part) == [folder] * ranks
        assert len([*folder.iterdir()]) >= min(samples, ranks) + 1
        assert same(read(folder), X[:samples])
    assert [one.name for one in sorted((tmp_path / "runs").iterdir())] == ["0", "1", "2"]


def in_processes(folder):
    in_files(folder, X, 7, 3)
    return predicted()


def test_processes_predict_and_write_what_threads_do(tmp_path):
    for found in run_processes(in_processes, 2, tmp_path / "out", timeout_s=60):
        for (n, _), one in zip(CASES, found, strict=True):
            assert same(one, X[:n])
    assert same(read(tmp_path / "out"), X)


def test_a_stream_in_files(tmp_path):
    def run():
        made = trainer()
        stream = [torch.arange(2) + 10 * made.world.rank] * 2
        return made.predict(stream, fn=lambda m, b: b, to=tmp_path / "out")

    run_ranks(run, 2)
    assert [int(one) for one in read(tmp_path / "out")] == [0, 1, 0, 1, 10, 11, 10, 11]


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    for name in ("there", "file"):
        for error in told(try_ranks(in_files, 2, tmp_path / name, X, 7, 3)):
            assert "'): it is there already, and nothing is overwritten" in error
            assert str(tmp_path / name) in error
    run_ranks(in_files, 2, tmp_path / "empty", X, 7, 3)
    assert same(read(tmp_path / "empty"), X)
    assert (tmp_path / "there" / "file").read_text() == (tmp_path / "file").read_text() == "mine"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["empty", "file", "there"]


def files_hold(model, x):
    half = x[:, :3].bfloat16()
    return {
        7: (half.T.contiguous().T, x[:, :0], torch.complex(x, -x).conj(), x > 0, x[:, 1]),
        "ragged": [row[: n % 3] for n, row in enumerate(x)],
        "objects": [{"a": [1, None, True, float("inf")], "é": (row[0].item(),)} for row in x],
        "numbers": x[:, 0].double().numpy(),
        "names": np.array([f"n{n}" for n in range(len(x))]),
    }


def test_files_hold_what_a_list_does(tmp_path):
    run = trainer()
    wanted = run.predict(X, batch_size=5, fn=files_hold)  # the last has one sample
    run.predict(X, batch_size=5, fn=files_hold, to=tmp_path / "out")
    for one, other in zip(wanted, read(tmp_path / "out"), strict=True):
        assert list(one) == list(other)
        for mine, theirs in zip(one[7], other[7], strict=True):
            assert mine.dtype == theirs.dtype
            assert torch.equal(mine, theirs)
        assert torch.equal(one["ragged"], other["ragged"])
        assert one["objects"] == other["objects"]
        assert type(one["numbers"]) is type(other["numbers"])
        assert (one["numbers"], one["names"]) == (other["numbers"], other["names"])


def test_predictions_that_are_not_whole(tmp_path):
    folder = tmp_path / "out"
    with pytest.raises(dtrain.DataError, match="holds no predictions: predict"):
        dtrain.load_predictions(folder)
    run_ranks(in_files, 2, folder, X, 7, 3)
    part = folder / "part-00001-000000.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-1])
    words = f"part-00001-000000.safetensors has {len(content) - 1} bytes, not {len(content)}"
    with pytest.raises(dtrain.DataError, match=words):
        dtrain.load_predictions(folder)
    part.unlink()
    with pytest.raises(dtrain.DataError, match=r"part-00001-000000\.safetensors is missing"):
        dtrain.load_predictions(folder)


def test_a_rank_removes_its_own_parts_at_once(tmp_path):
    run = trainer()
    parts = parts_of.Parts(tmp_path / "out", run.world, run.context)
    parts.open()
    parts._bytes = parts_of._PART_BYTES
    parts.add(X, len(X))
    (folder,) = tmp_path.iterdir()
    assert [*folder.iterdir()]
    parts.drop()
    assert not [*folder.iterdir()]
    parts.__exit__(ValueError, ValueError("told to all"), None)
    assert not [*tmp_path.iterdir()]


def full(folder):
    run = trainer()
    if run.world.rank == 1:
        real = parts_of.write_tensors

        def write(file, tensors):
            if file.name == "part-00001-000001.safetensors":
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(file, tensors)

        parts_of.write_tensors = write
    parts_of._PART_SAMPLES = 3
    run.predict(X, batch_size=7, fn=described, to=folder)


def test_a_full_disk(tmp_path):
    first, second = run_outcomes(full, 2, tmp_path / "out")
    assert isinstance(first.error, dtrain.RemoteError) or "RemoteError" in str(first.error)
    for error in told([first, second]):
        assert "No space left on device" in error
        assert "part-00001-000001.safetensors, a part of predict(to=" in error
        assert "could not be written; what was is removed" in error
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", ["order", "object", "sparse", "dtype", "left out"])
def test_what_cannot_be_in_files(tmp_path, kind):
    def run():
        data, fn = dtrain.Data(X, 7, order=dtrain.data.Shuffled(31, seed=0)), described
        if kind == "object":
            data, fn = dtrain.Data(X, 7), lambda m, x: [object() for _ in x]
        if kind == "sparse":
            data, fn = dtrain.Data(X, 7), lambda m, x: x.to_sparse()
        if kind == "dtype":
            data, fn = dtrain.Data(X, 7), lambda m, x: torch.complex(x, x).cdouble()
        if kind == "left out":
            data = LACKING
        trainer().predict(data, fn=fn, to=tmp_path / "out")

    words = {
        "sparse": "files cannot hold a tensor that is torch.float32, torch.sparse_coo",
        "dtype": "files cannot hold a tensor that is torch.complex128, torch.strided",
        "left out": f"predict: collate_fn has left out {LEFT} of 31 samples",
        "order": "order=Shuffled would scatter each part's samples over the dataset",
        "object": "of the outputs, 0/1/0 is object; files hold arrays, dicts, lists, tuples,",
    }
    for error in told(try_ranks(run, 2)):
        assert words[kind] in error
    assert not [*tmp_path.iterdir()]


def alone(folder, dies):
    parts_of._PART_SAMPLES = 3

    def fn(model, x):
        if dies and X[20].tolist() in x.tolist():
            os.kill(os.getpid(), signal.SIGKILL)
        return described(model, x)

    words = tiny.Words()
    run = dtrain.Trainer(tiny.model(), None, tiny.loss_fn, sinks=[words])
    run.predict(X, batch_size=7, fn=fn, to=folder)


def test_a_call_that_was_killed_leaves_no_folder_and_may_come_again(tmp_path, capsys):
    process = multiprocessing.get_context("fork").Process(
        target=alone, args=(tmp_path / "out", True)
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    assert left.name.endswith(".unfinished")
    assert [*left.iterdir()]
    run = dtrain.Trainer(tiny.model(), None, tiny.loss_fn)
    run.predict(X, batch_size=7, fn=described, to=tmp_path / "out")
    assert same(read(tmp_path / "out"), X)
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    assert (
        f"removed what unfinished calls of predict had left: {left.name}" in capsys.readouterr().out
    )


def loses_its_folder(folder):
    def fn(model, x):
        for one in folder.parent.iterdir():
            for part in one.glob("*-000000.*"):
                part.unlink()
        return described(model, x)

    parts_of._PART_SAMPLES = 3
    trainer().predict(X, batch_size=7, fn=fn, to=folder)


def test_a_part_that_is_gone_is_told(tmp_path):
    for error in told(try_ranks(loses_its_folder, 2, tmp_path / "out")):
        assert "-000000.safetensors is gone, as if another run wrote to the same folder" in error
    assert not [*tmp_path.iterdir()]


def test_the_example_of_the_page(capsys):
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    (example,) = re.findall(r"^```python\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.M)
    run_ranks(exec, 1, example, {})
    told = capsys.readouterr().out
    assert "'eval/auc': " in told
    assert "torch.Size([101, 1])" in told


def told_of_streams(own, call):
    stream = io.StringIO()
    console = dtrain.sinks.Console(stream)
    run = dtrain.Trainer(
        nn.Linear(1, 1), None, lambda m, b: dtrain.Metrics(outputs=b), sinks=[console]
    )
    rank = dtrain.init().rank if own else 0
    found = getattr(run, call)([torch.arange(2.0)[:, None] + 10 * rank])
    lines = stream.getvalue().splitlines()
    return found, [text for text in lines if "the same first batch" in text]


@pytest.mark.parametrize(
    ("call", "last"), [("predict", "an output as often.)"), ("evaluate", "(This is of eval.)")]
)
def test_ranks_that_all_have_the_whole_stream_are_told_of(call, last):
    (found, words), (_, none) = run_ranks(told_of_streams, 2, False, call)
    assert len(found) == (4 if call == "predict" else 0)
    (text,) = words
    assert text.startswith("warning: all ranks' streams gave the same first batch: each rank seems")
    assert text.endswith(last)
    assert not none
    assert not any(words for _, words in run_ranks(told_of_streams, 2, True, call))
    assert not any(words for _, words in run_ranks(told_of_streams, 1, False, call))
