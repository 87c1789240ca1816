"""aliprod: a build system for ensembles of image classifiers on a Ray cluster."""

__version__ = "0.1.0"
