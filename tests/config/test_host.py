"""Seven-bit weights only where 8 bits overflow."""

import pytest

from edgekd.config.host import saturates


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("sse4_2 avx2", True), ("avx2 avx_vnni", False), ("avx512f avx512_vnni", False)],
)
def test_x86_by_its_flags(tmp_path, flags, expected):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor : 0\nflags : fpu {flags}\n")
    assert saturates("x86_64", cpuinfo) is expected


def test_arm_sums_in_32_bits_and_an_x86_that_says_nothing_counts_as_old(tmp_path):
    assert not saturates("aarch64", tmp_path / "none")
    assert saturates("AMD64", tmp_path / "none")
