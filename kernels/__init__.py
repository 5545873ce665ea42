"""Triton kernels and their torch references; imported as `qplugins.kernels`. Knows tensors, never engines.

Run from a checkout, Python also finds this folder under the plain name `kernels`, in front of the unrelated package of that name which
SGLang and transformers import. Under that name this file steps aside: it puts the installed package in its own place, or stays empty.
"""

if __name__ == "kernels":
    import importlib.machinery
    import importlib.util
    import os
    import sys

    here = os.path.dirname(os.path.abspath(__file__))
    spec = importlib.machinery.PathFinder.find_spec(
        "kernels", [p for p in sys.path if os.path.join(os.path.abspath(p or "."), "kernels") != here]
    )
    if spec is not None and spec.loader is not None:
        module = importlib.util.module_from_spec(spec)
        sys.modules["kernels"] = module
        spec.loader.exec_module(module)
