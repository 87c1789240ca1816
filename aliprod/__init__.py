"""aliprod: a build system for ensembles of image classifiers on a Ray cluster."""

from aliprod.version import VERSION as __version__

__all__ = ["__version__"]
