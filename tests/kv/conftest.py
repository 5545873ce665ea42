"""As in tests/kernels: the same tests run compiled on a GPU, and under Triton's interpreter without one. Inputs are new in every run."""

import pytest
import torch

from qplugins.kernels.common.device import INTERPRET


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter looks at the variable again while it runs; tests of other folders start processes that must not have it."""
    if INTERPRET.value:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def fresh_inputs() -> None:
    """A failure prints the seed, and `torch.manual_seed` with it brings the same numbers back."""
    seed = torch.seed() % (1 << 31)
    torch.manual_seed(seed)
    print(f"torch.manual_seed({seed})")
