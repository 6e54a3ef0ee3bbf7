# SPDX-License-Identifier: Apache-2.0
"""One suite for CPU tensors and for a Hopper GPU: `--device cuda` runs the same tests there."""

from __future__ import annotations

import pytest
import sinkattn
import torch
from sinkattn._info import unavailable_reason

# What the CUDA backend does not serve yet, by the name a test asks for. What is not listed and
# raises NotImplementedError on CUDA fails its test.
NOT_YET_ON_CUDA = {
    "e4m3": "8-bit inputs have no CUDA kernel yet",
    "query_v": "qv has no CUDA kernel yet",
}


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=("cpu", "cuda", "both"),
        default="both",
        help="where the tests that take a device run; both: CUDA is skipped where it cannot run",
    )
    parser.addoption(
        "--tier",
        choices=("quick", "full"),
        default="quick",
        help="full: also what needs hours or most of a GPU's memory, and 1000 repetitions for 20",
    )


def pytest_collection_modifyitems(config, items):
    if config.getoption("--tier") == "full":
        return
    for item in items:
        if item.get_closest_marker("full"):
            item.add_marker(pytest.mark.skip(reason="long tier: --tier full"))


@pytest.fixture(scope="session")
def repetitions(request) -> int:
    """How often a result must come out with the same bits."""
    return 1000 if request.config.getoption("--tier") == "full" else 20


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("--device")
        devices = ("cpu", "cuda") if chosen == "both" else (chosen,)
        metafunc.parametrize("device", devices, indirect=True, scope="session")


@pytest.fixture(scope="session")
def device(request):
    if request.param == "cuda":
        reason = unavailable_reason()
        if reason is not None:
            pytest.skip(f"no Hopper GPU: {reason}")
    return request.param


@pytest.fixture
def needs(device):
    """needs("e4m3") skips on CUDA while that part is on the list above."""

    def check(*features):
        for feature in features:
            if device == "cuda" and feature in NOT_YET_ON_CUDA:
                pytest.skip(f"not yet on CUDA: {NOT_YET_ON_CUDA[feature]}")

    return check


@pytest.fixture(autouse=True)
def _few_threads():
    """Workers of pytest-xdist share the cores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)


def pytest_report_header(config):
    reason = unavailable_reason()
    cuda = "usable" if reason is None else f"not usable ({reason})"
    return f"sinkattn {sinkattn.__version__}, torch {torch.__version__}, CUDA {cuda}"
