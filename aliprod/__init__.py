"""aliprod: a build system for ensembles of image recognisers on a Ray cluster."""

__version__ = "0.1.0"
