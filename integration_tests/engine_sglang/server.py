"""SGLang, started and asked as a user would: `launch_server`, HTTP."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from integration_tests.server import NAME, Server


class SglangServer(Server):
    """`python -m sglang.launch_server`. On a CPU it needs the test platform that lies in `cpu_platform`.

    quantization, kv_cache_dtype  the values of those options; None leaves one out
    """

    def __init__(
        self,
        model: Path | str,
        *,
        quantization: str | None = None,
        kv_cache_dtype: str | None = None,
        dtype: str = "float32",
        tensor_parallel_size: int = 1,
        context_length: int = 512,
        max_total_tokens: int | None = 8192,
        max_running: int = 8,
        args: Sequence[str] = (),
        env: dict[str, str] | None = None,
        log: Path | None = None,
        timeout: float = 240,
    ) -> None:
        # one thread a rank: several would wait for each other on a busy machine
        cores = f"0-{(os.cpu_count() or 1) - 1}"
        cpu = {"OMP_NUM_THREADS": "1", "SGLANG_CPU_OMP_THREADS_BIND": "|".join([cores] * tensor_parallel_size)}
        # a worker that imports SGLang on a busy machine is silent for longer than the 5 s after which uvicorn ends it
        patience = {"SGLANG_UVICORN_WORKER_HEALTHCHECK_TIMEOUT": "240"}
        super().__init__(model, args=args, env={**cpu, **patience, **(env or {})}, log=log, timeout=timeout)
        self.options = ["--dtype", dtype, "--context-length", str(context_length), "--skip-server-warmup"]
        self.options += ["--max-running-requests", str(max_running)]
        if max_total_tokens is not None:
            self.options += ["--max-total-tokens", str(max_total_tokens)]
        if not torch.cuda.is_available():
            self.options += ["--device", "cpu"]
        if quantization is not None:
            self.options += ["--quantization", quantization]
        if kv_cache_dtype is not None:
            self.options += ["--kv-cache-dtype", kv_cache_dtype]
        if tensor_parallel_size > 1:
            self.options += ["--tp-size", str(tensor_parallel_size)]

    def command(self) -> list[str]:
        launch = [sys.executable, "-m", "sglang.launch_server", "--model-path", self.model, "--served-model-name", NAME]
        return [*launch, "--host", "127.0.0.1", "--port", str(self.port), *self.options, *self.args]

    def chat(self, text: str, **options: Any) -> str:
        body = {"model": NAME, "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 32, **options}
        return self.post("/v1/chat/completions", body)["choices"][0]["message"]["content"]

    def complete(self, prompt: str | Sequence[int], **options: Any) -> str:
        prompt = prompt if isinstance(prompt, str) else list(prompt)
        return self.post("/v1/completions", {"model": NAME, "prompt": prompt, "temperature": 0, "max_tokens": 32, **options})["choices"][0][
            "text"
        ]

    def generate(self, tokens: Sequence[int], *, max_new_tokens: int = 1, **options: Any) -> dict[str, Any]:
        """SGLang's own endpoint: the answer to token ids, with its `meta_info`."""
        sampling = {"temperature": 0, "max_new_tokens": max_new_tokens, "ignore_eos": True}
        return self.post("/generate", {"input_ids": list(tokens), "sampling_params": sampling, **options})

    def prompt_logprobs(self, tokens: Sequence[int], top: int) -> list[dict[int, float]]:
        info = self.generate(tokens, return_logprob=True, logprob_start_len=0, top_logprobs_num=top)["meta_info"]
        own, likeliest = info["input_token_logprobs"][1:], info["input_top_logprobs"][1:]
        # NaN comes as null
        return [
            {int(token): math.nan if logprob is None else logprob for logprob, token, *_ in [*likely, mine]}
            for likely, mine in zip(likeliest, own, strict=True)
        ]

    def cached_tokens(self, tokens: Sequence[int]) -> int:
        """How many tokens of a prompt the prefix cache already had."""
        return self.generate(tokens)["meta_info"]["cached_tokens"]
