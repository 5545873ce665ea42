# source bench/checkout.sh: makes the checkout importable as qplugins where it cannot be installed.
# Links take the place of setup.py's mapping: kernels/ and checkpoints/ inside the package.
export PYTHONSAFEPATH=1 PYTHONPATH=/tmp/qplugins-checkout${PYTHONPATH:+:$PYTHONPATH}
mkdir -p /tmp/qplugins-checkout/qplugins
ln -sfn "$PWD"/qplugins/* "$PWD"/kernels "$PWD"/checkpoints /tmp/qplugins-checkout/qplugins/
# and the metadata that an installation would have: engines find their plugin by its entry points
python3 - <<'END'
import pathlib, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
folder = pathlib.Path(f"/tmp/qplugins-checkout/qplugins-{project['version']}.dist-info")
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: qplugins\nVersion: {project['version']}\n")
groups = project["entry-points"].items()
(folder / "entry_points.txt").write_text("".join(f"[{g}]\n" + "".join(f"{k} = {v}\n" for k, v in e.items()) for g, e in groups))
END
