"""``python -m aliprod``."""

from aliprod.cli import main

main()
