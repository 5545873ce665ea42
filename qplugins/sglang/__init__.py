"""The SGLang adapter: the entry point is `register`, its version differences are in `compat`."""
