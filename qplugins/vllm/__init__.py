"""The vLLM adapter. `register` is the entry point that vLLM calls in each of its processes."""
