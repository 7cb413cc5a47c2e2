"""Tests that run only where there is CUDA: elsewhere they are not collected at all, so that nothing is skipped.

`CASA_GPU_TESTS=cpu pytest tests/gpu -n 0` rehearses them without a GPU: the same code on small shapes, with the
implementations that run on a CPU. What only a GPU can answer is skipped then, by name.
"""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CUDA = torch.cuda.is_available()
REHEARSAL = os.environ.get("CASA_GPU_TESTS") == "cpu"

if not (CUDA or REHEARSAL):
    collect_ignore_glob = ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: runs where there is CUDA only (tests/gpu)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            # what torch's compiler warns of on a GPU varies with its version and ours to mend it is not
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if CUDA and not REHEARSAL else "cpu")


@pytest.fixture(scope="session")
def real(device: torch.device) -> None:
    """For what a rehearsal cannot show."""
    if device.type != "cuda":
        pytest.skip("only a GPU can answer this")


@pytest.fixture(autouse=True)
def full_float32() -> None:
    """float32 means float32 here, whatever torch's default for matrix products on this GPU is."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def no_worse() -> Callable[..., None]:
    """no_worse(fast, plain, truth): at most twice the error of plain torch in the same precision."""

    def check(fast: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, what: str = "output") -> None:
        assert fast.isfinite().all(), f"{what} is not finite"
        if not truth.numel():
            return
        allowed = 2 * (plain.double() - truth).abs().max().item()
        # Beside it the largest entry rounded once; in float32, where plain torch may by chance be nearly exact, a few
        # times (another order of summing was 1.3 eps off). A wrong mask or TF32 is a thousand times that.
        roundings = 16 if fast.dtype == torch.float32 else 1
        allowed += roundings * torch.finfo(fast.dtype).eps / 2 * truth.abs().max().item()
        error = (fast.double() - truth).abs().max().item()
        assert error <= allowed, f"{what} is off by {error:.3g}, where plain torch allows {allowed:.3g}"

    return check
