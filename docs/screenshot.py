"""Draw ``docs/images/report.png`` from a run: the head of its report and the first two charts.

    python docs/screenshot.py runs/digits

It needs chromium (Debian: ``apt-get install chromium``).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

PICTURE = Path(__file__).parent / "images" / "report.png"
HEAD_AND_CHARTS = (
    "<style>section:not(:nth-of-type(3)) { display: none } body { background: #fff }</style></head>"
)
COLOURS = 128
MARGIN = 24


def main(run: Path) -> None:
    """Take the picture and cut off what is empty."""
    report = (run / "report" / "report.html").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        page, shot = Path(folder, "report.html"), Path(folder, "shot.png")
        page.write_text(report.replace("</head>", HEAD_AND_CHARTS, 1), encoding="utf-8")
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += ["--force-device-scale-factor=1.6", "--window-size=1000,1000"]
        subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], check=True)
        picture = Image.open(shot).convert("RGB")
    empty = Image.new("RGB", picture.size, picture.getpixel((0, 0)))
    box = ImageChops.difference(picture, empty).getbbox()
    assert box is not None, "the page is empty"
    picture = picture.crop((0, 0, picture.width, min(picture.height, box[3] + MARGIN)))
    picture.quantize(COLOURS, dither=Image.Dither.NONE).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
