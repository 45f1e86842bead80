"""Does 8-bit arithmetic overflow on this processor?"""

from __future__ import annotations

import platform
from pathlib import Path

_X86 = {"x86_64", "amd64", "i386", "i686", "x86"}
# Dot-product instructions that add four 8-bit products in 32 bits. VNNI is avx_vnni or
# avx512_vnni; AMX has its own.
_WIDE = ("avx_vnni", "avx512_vnni", "amx_int8")


def saturates(machine: str | None = None, cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """True where uint8 x int8 products are summed in pairs in 16 bits and may overflow.

    That is x86 before VNNI (``vpmaddubsw``): 255 x 127 x 2 exceeds 32767. Weights of 7 bits fit.
    ARM and newer x86 sum in 32 bits. Where an x86 does not say what it has, it counts as old:
    one bit of the weights costs less than a wrong sum.
    """
    if (machine or platform.machine()).lower() not in _X86:
        return False
    try:
        flags = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return True
    return not any(name in flags for name in _WIDE)
