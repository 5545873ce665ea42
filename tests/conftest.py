"""Puts the repository at the end of the module path, for helpers that tests share: never at its beginning, where kernels/ and checkpoints/
would stand in front of installed packages of those names. And runs what is quick first."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))

# Without a GPU kernels run under Triton's interpreter. Triton decides that where a kernel is defined, so before anything else imports one;
# processes that tests start decide for themselves.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    import qplugins.kernels.attention.op  # noqa: F401
    import qplugins.kernels.linear.op  # noqa: F401
    import qplugins.kernels.moe  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


KERNELS = ("kernels", "kv")  # folders of tests that call kernels themselves


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels run: compiled on a GPU, under Triton's interpreter without one. The tests are the same."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def kernel_test(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests of kernels: other numbers in every run, and the interpreter where there is no GPU."""
    if request.path.parent.name not in KERNELS:
        return
    # Triton looks at the variable again while it interprets; processes that other tests start must not have it
    if not torch.cuda.is_available():
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    # a failure prints the seed, and `torch.manual_seed` with it brings the same numbers back
    seed = torch.seed() % (1 << 31)
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def cost(item: pytest.Item) -> int:
        folder = item.path.relative_to(ROOT).parts
        return 2 * (folder[0] == "integration_tests") + (
            (folder[0] == "tests" and folder[1] in KERNELS) or item.get_closest_marker("real_model") is not None
        )

    items.sort(key=cost)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
