"""What `ray job submit` starts after a checkpoint was chosen: the same as ``aliprod ensemble``."""

import sys

from aliprod.cli import app

if __name__ == "__main__":
    app(["ensemble", *sys.argv[1:]], prog_name="ensemble.py")
