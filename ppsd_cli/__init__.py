"""Pipeline-parallel self-speculative decoding: one stream, several devices, exact tokens."""

__version__ = "0.1.0"
