"""SGLang's HTTP app for workers that uvicorn starts by name (--tokenizer-worker-num above 1): they load no plugins by themselves."""

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.entrypoints.http_server import app  # noqa: E402

__all__ = ["app"]
