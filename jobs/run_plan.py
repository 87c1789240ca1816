"""What `ray job submit` starts: the same as ``aliprod run``, with the same arguments."""

import sys

from aliprod.cli import app

if __name__ == "__main__":
    app(["run", *sys.argv[1:]], prog_name="run_plan.py")
