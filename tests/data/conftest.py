"""A busy machine makes no test of data wrong: hypothesis sets no deadline here. And tests share what they expect."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.append(str(Path(__file__).parent))
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
