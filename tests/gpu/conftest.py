"""Where the tests run: on the GPU; with ``--device cpu``, as a dry run, on what stands in."""

import pytest
import stand_in
import torch


def pytest_addoption(parser):
    parser.addoption("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a dry run")


def pytest_report_header(config):
    if config.getoption("--device") == "cpu":
        return "a dry run on the CPU, where no GPU's behaviour is seen"
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return f"torch {torch.__version__}, GPUs: {', '.join(names) or 'none'}"


@pytest.fixture(autouse=True)
def device(request, monkeypatch):
    wanted = torch.device(request.config.getoption("--device"))
    if wanted.type == "cuda":
        assert torch.cuda.is_available(), "these tests need a GPU; --device cpu is a dry run"
    else:
        stand_in.pretend(monkeypatch)
    return wanted
