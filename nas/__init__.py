"""supernas: one training engine for every kind of weight-shared supernet; plain pruned networks out."""
from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("supernas")
except PackageNotFoundError:  # run from a checkout that is not installed
    __version__ = "0+unknown"
