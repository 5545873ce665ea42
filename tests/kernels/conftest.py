"""Kernels run compiled on a GPU, and under Triton's interpreter without one: the same tests, `device` decides."""

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
def fresh_inputs(request: pytest.FixtureRequest) -> int:
    """Other numbers in every run; a failure prints the seed, and `torch.manual_seed` with it brings them back."""
    seed = torch.seed() % (1 << 31)
    torch.manual_seed(seed)
    request.node.user_properties.append(("seed", seed))
    print(f"torch.manual_seed({seed})")
    return seed
