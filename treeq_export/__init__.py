"""From a Diffusion Transformer checkpoint to a validated, timed low-bit engine."""

__version__ = "0.1.0"
