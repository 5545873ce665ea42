"""qplugins: mixed-precision weights and INT4 KV cache as plugins for unmodified vLLM and SGLang."""

__version__ = "0.1.0"
