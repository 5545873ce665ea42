"""The module path, as in tests/conftest.py, and the models that every engine's tests share."""

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in BF16."""
    from integration_tests.models import smollm2

    return smollm2()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in BF16 whose sizes divide by two ranks and by 128."""
    from integration_tests.models import tiny_llama

    return tiny_llama(tmp_path_factory.mktemp("models") / "tiny-llama")
