"""Pipeline-parallel self-speculative decoding: one stream, several devices, the model's own tokens."""

__version__ = "0.1.0"
