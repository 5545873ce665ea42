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
    import qplugins.kernels.linear  # noqa: F401

    del os.environ["TRITON_INTERPRET"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def cost(item: pytest.Item) -> int:
        folder = item.path.relative_to(ROOT).parts
        return 2 * (folder[0] == "integration_tests") + (
            folder[:2] in (("tests", "kernels"), ("tests", "kv")) or item.get_closest_marker("real_model") is not None
        )

    items.sort(key=cost)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))
