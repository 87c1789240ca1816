"""Pictures of a report, as a desk, a phone, a phone in the dark and paper show it, and whether it fits the phone.

    python benchmarks/screenshots.py runs/quickstart/report.html shots/

Needs chromium (apt-get install chromium). Prints each file, and how wide the page is on a screen of 390 pixels.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

PHONE = 390  # pixels
_FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars",
    "--allow-file-access-from-files", "--disable-quic", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
_DARK = "--blink-settings=preferredColorScheme=0"
_FRAME = """<iframe src="{page}" width="{width}" height="900"></iframe><script>
onload = () => {{ const page = frames[0].document.documentElement;
document.body.dataset.seen = `${{page.scrollWidth}} ${{page.scrollHeight}}`; }}</script>"""


def browser() -> str | None:
    """The chromium of this machine."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def size(page: Path, width: int) -> tuple[int, int]:
    """How wide and high a page is on a screen of so many pixels; wider than that, it scrolls sideways."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.html"
        frame.write_text(_FRAME.format(page=page.resolve().as_uri(), width=width))
        seen = re.search(r'data-seen="(\d+) (\d+)"', _chromium("--dump-dom", frame.as_uri()))
    if seen is None:
        raise RuntimeError("the browser did not say")
    return int(seen[1]), int(seen[2])


def shoot(page: Path, folder: Path) -> list[Path]:
    """Write desk.png, phone.png, dark.png, paper.pdf and report.png, figures without paths: docs/images has one."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for name, width, flags in (("desk", 1280, ()), ("phone", PHONE, ()), ("dark", PHONE, (_DARK,))):
        made.append(folder.resolve() / f"{name}.png")
        window = f"--window-size={width},{size(page, width)[1]}"
        _chromium(window, *flags, f"--screenshot={made[-1]}", page.resolve().as_uri())
    made.append(folder.resolve() / "report.png")
    with Image.open(made[0]) as desk:
        desk.convert("RGB").crop((0, 490, desk.width, 2400)).quantize(64).save(made[-1], optimize=True)
    made.append(folder.resolve() / "paper.pdf")
    _chromium("--no-pdf-header-footer", f"--print-to-pdf={made[-1]}", page.resolve().as_uri())
    return made


def _chromium(*arguments: str) -> str:
    if (program := browser()) is None:
        raise RuntimeError("there is no chromium on this machine: apt-get install chromium")
    with tempfile.TemporaryDirectory() as profile:
        command = (program, *_FLAGS, f"--user-data-dir={profile}", *arguments)
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


if __name__ == "__main__":
    report, out = map(Path, sys.argv[1:])
    for path in shoot(report, out):
        print(path)
    print(f"{size(report, PHONE)[0]} pixels wide on a screen of {PHONE}")
