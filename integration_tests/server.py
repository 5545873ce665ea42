"""A real engine process, asked over HTTP as a user would ask it.

    with VllmServer(folder, quantization="qplugins") as server:
        server.chat("What is the capital of France?")          # "The capital of France is Paris."
        server.prompt_logprobs([1, 504, 3575, ...], top=500)   # one {token: log-probability} a position

`Server` is what engines share; an engine's own class says how to start it and how it phrases an answer. Tests speak to this interface
only, so that they are the same for every engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import requests

NAME = "model"  # what the served model is called in requests
TAIL = 40  # lines of the log that an error shows


class ServerFailed(RuntimeError):
    """The engine did not come up, or died. `log` is all that it wrote, `returncode` its exit status, None while it still ran."""

    def __init__(self, reason: str, command: Sequence[str], log: str, returncode: int | None) -> None:
        tail = "\n".join(log.splitlines()[-TAIL:])
        super().__init__(f"{' '.join(command)}\n{reason}; the end of its log:\n{tail}")
        self.log, self.returncode = log, returncode


def free_port() -> int:
    """A TCP port that nothing listens on. Another process may take it before it is used; a server that loses that race fails to start."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _end_with_parent() -> None:
    """In the child, before it becomes the engine: the kernel ends it when whoever started it dies, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


class Server(ABC):
    """Starts on entering the context, and is gone, with every process that it started, on leaving it.

    model    a checkpoint folder
    args     further words of the command line
    env      environment variables beside this process's own
    log      the file that the engine's output goes to; a temporary one by default
    timeout  seconds until it must answer
    """

    def __init__(
        self,
        model: Path | str,
        *,
        args: Sequence[str] = (),
        env: dict[str, str] | None = None,
        log: Path | None = None,
        timeout: float = 240,
    ) -> None:
        self.model, self.args, self.env, self.timeout = str(model), list(args), dict(env or {}), timeout
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        if log is None:
            handle, name = tempfile.mkstemp(prefix="engine-", suffix=".log")
            os.close(handle)
            log = Path(name)
        self.log_file = log
        self.seconds_to_start = float("nan")
        self._process: subprocess.Popen[bytes] | None = None
        self._http = requests.Session()
        self._http.trust_env = False  # no proxy stands between us and this machine

    @abstractmethod
    def command(self) -> list[str]:
        """The command line."""

    @abstractmethod
    def chat(self, text: str, **options: Any) -> str:
        """The answer to one message of a user, greedily decoded. `options` are fields of the request."""

    @abstractmethod
    def complete(self, prompt: str | Sequence[int], **options: Any) -> str:
        """The greedy continuation of a text or of token ids."""

    @abstractmethod
    def prompt_logprobs(self, tokens: Sequence[int], top: int) -> list[dict[int, float]]:
        """What the model says about each next token of a text: for every position i < len(tokens) - 1 the log-probabilities, natural, of
        the `top` likeliest tokens after tokens[: i + 1], and of tokens[i + 1] itself."""

    def __enter__(self) -> Server:
        started = time.monotonic()
        env = {**os.environ, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE", **self.env}
        with open(self.log_file, "wb") as log:
            self._process = subprocess.Popen(
                self.command(), stdout=log, stderr=subprocess.STDOUT, env=env, start_new_session=True, preexec_fn=_end_with_parent
            )
        try:
            while not self._healthy():
                if self._process.poll() is not None:
                    raise self._failed(f"exited with status {self._process.returncode}")
                if time.monotonic() - started > self.timeout:
                    raise self._failed(f"did not answer within {self.timeout:.0f} s")
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        self.seconds_to_start = time.monotonic() - started
        return self

    def __exit__(self, *exc: object) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # The engine's workers are in its process group, and may outlive it: asked to end once, and made to a little later.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:
                process.poll()  # collects the exit status: an ended process that nobody waited for still counts as one of the group
                os.killpg(process.pid, 0)
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self._http.close()

    def _healthy(self) -> bool:
        try:
            return self._http.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def _failed(self, reason: str) -> ServerFailed:
        assert self._process is not None
        return ServerFailed(reason, self.command(), self.log, self._process.poll())

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The JSON answer to a JSON request. Raises ServerFailed where the engine refuses it or has died."""
        try:
            reply = self._http.post(self.url + path, json=body, timeout=self.timeout)
        except requests.RequestException as e:
            raise self._failed(f"POST {path}: {e}") from e
        if reply.status_code != 200:
            raise self._failed(f"POST {path} answered {reply.status_code}: {reply.text[:500]}")
        return reply.json()


class VllmServer(Server):
    """`vllm serve`. Defaults are for tests: float32, in which the same text gives the same numbers in every batch shape, and no compiling.

    quantization  the value of --quantization; None leaves it out
    compiled      let vLLM compile the model and capture CUDA graphs, as it does by itself
    kv_bytes      of a GPU's memory, for the KV cache. vLLM then does not measure what is free, so that several may share a GPU
    """

    def __init__(
        self,
        model: Path | str,
        *,
        quantization: str | None = None,
        dtype: str = "float32",
        tensor_parallel_size: int = 1,
        max_model_len: int = 512,
        compiled: bool = False,
        kv_bytes: int | None = None,
        args: Sequence[str] = (),
        env: dict[str, str] | None = None,
        log: Path | None = None,
        timeout: float = 240,
    ) -> None:
        # On a CPU each worker would be bound to cores of its own, which a small or shared machine has not got.
        threads = max(1, (os.cpu_count() or 1) // tensor_parallel_size)
        cpu = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(min(threads, 8))}
        super().__init__(model, args=args, env={"VLLM_NO_USAGE_STATS": "1", **cpu, **(env or {})}, log=log, timeout=timeout)
        self.options = ["--dtype", dtype, "--max-model-len", str(max_model_len), "--max-num-seqs", "8", "--max-logprobs", "-1"]
        if quantization is not None:
            self.options += ["--quantization", quantization]
        if tensor_parallel_size > 1:
            self.options += ["--tensor-parallel-size", str(tensor_parallel_size), "--distributed-executor-backend", "mp"]
        if kv_bytes is not None:
            self.options += ["--kv-cache-memory-bytes", str(kv_bytes), "--gpu-memory-utilization", "0.1"]
        if not compiled:
            self.options += ["--enforce-eager"]
            self.env.setdefault("TORCHDYNAMO_DISABLE", "1")  # the sampler's own compiled pieces: twenty seconds before the first answer

    def command(self) -> list[str]:
        # what the command `vllm` does, also where the package came without its script
        vllm = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
        where = ["--host", "127.0.0.1", "--port", str(self.port), "--served-model-name", NAME]
        return [*vllm, "serve", self.model, *where, *self.options, *self.args]

    @property
    def kv_tokens(self) -> int:
        """How many tokens the KV cache holds, as vLLM tells while it starts."""
        return int(re.search(r"KV cache size: ([\d,]+) tokens", self.log)[1].replace(",", ""))

    def chat(self, text: str, **options: Any) -> str:
        body = {"model": NAME, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 32, **options}
        return self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def complete(self, prompt: str | Sequence[int], **options: Any) -> str:
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        body = {"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 32, **options}
        return self.post("/v1/completions", body)["choices"][0]["text"]

    def prompt_logprobs(self, tokens: Sequence[int], top: int, **options: Any) -> list[dict[int, float]]:
        body = {"model": NAME, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": top, **options}
        positions = self.post("/v1/completions", body)["choices"][0]["prompt_logprobs"]
        # nothing comes before the first token, and so nothing is said about it
        return [{int(token): entry["logprob"] for token, entry in position.items()} for position in positions[1:]]


def start_together(stack: ExitStack, servers: Sequence[AbstractContextManager]) -> list[AbstractContextManager]:
    """Starts all servers at once, to end with `stack`. What comes back are contexts of the servers, or of the errors that starting them raised."""
    # its threads end after the servers: a server ends with the thread that started it
    threads = stack.enter_context(ThreadPoolExecutor(len(servers)))
    starting = [threads.submit(stack.enter_context, server) for server in servers]
    wait(starting)

    @contextmanager
    def started(future):
        yield future.result()

    return [started(future) for future in starting]


@contextmanager
def together(*servers: Server) -> Iterator[list[Server]]:
    """All servers, started at once. Raises what starting one of them raised."""
    with ExitStack() as stack:
        yield [stack.enter_context(server) for server in start_together(stack, servers)]
