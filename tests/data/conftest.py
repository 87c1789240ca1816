"""A busy machine makes no test of data wrong: hypothesis sets no deadline here."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
