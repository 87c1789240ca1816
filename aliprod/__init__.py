"""aliprod: a build system for ensembles of image classifiers on a Ray cluster."""

import atexit
import gc

from aliprod.lazy_dynamo import import_when_compiling
from aliprod.version import VERSION as __version__

__all__ = ["__version__"]

# torch, timm, Ray and MLflow make a million objects that stay. Looking for garbage among them at Python's pace takes a
# third of the time that a process needs to import them, and to end.
gc.set_threshold(50_000)
atexit.register(gc.freeze)
import_when_compiling()
