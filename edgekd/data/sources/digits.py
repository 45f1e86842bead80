"""scikit-learn's bundled handwritten digits: 1,797 scans of 8×8 pixels with values 0 to 16."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np

from edgekd.data.source import UNSPLIT, RawData, Request, Source

TEST_FRACTION = 0.25


def read_digits(request: Request) -> RawData:
    """``image`` uint8 (1797, 1, 8, 8) and ``label`` int64; a quarter is cut off as test."""
    from sklearn.datasets import load_digits

    request.refuse("path", "download")
    request.arguments(())
    digits = load_digits()
    image = digits.images.astype(np.uint8)[:, None]
    return RawData(
        splits={UNSPLIT: {"image": image, "label": digits.target.astype(np.int64)}},
        where="scikit-learn's load_digits",
        description=f"scikit-learn {version('scikit-learn')} load_digits",
        labels=tuple(str(digit) for digit in range(10)),
        layout="nchw",
        image_scale=1 / 16,
        test_fraction=TEST_FRACTION,
    )


def fingerprint_digits(request: Request) -> dict[str, str]:
    """The version of the package that bundles the scans."""
    return {"scikit-learn": version("scikit-learn")}


DIGITS = Source(read_digits, fingerprint_digits)
