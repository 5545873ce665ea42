"""`kernels/` and `checkpoints/` stand at the top of the repository and are installed inside the package, since SGLang depends on
another package that is called `kernels`. Everything else is in pyproject.toml."""

from setuptools import find_packages, setup

INSIDE = {"qplugins.kernels": "kernels", "qplugins.checkpoints": "checkpoints"}
packages = find_packages(include=["qplugins", "qplugins.*"])
for name, folder in INSIDE.items():
    packages += [name] + [f"{name}.{sub}" for sub in find_packages(folder)]

setup(packages=packages, package_dir=INSIDE)
