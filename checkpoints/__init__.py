"""Read, write, quantize, convert and verify checkpoints; imported as `qplugins.checkpoints`."""
