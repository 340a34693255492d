"""CRC-32, from Intel's library where it is installed: it adds up bytes an order of magnitude faster than zlib does.

A checkpoint of a gigabyte in PyTorch's format has as many bytes summed up, by whoever writes or verifies it.
"""

from __future__ import annotations

try:
    from isal.isal_zlib import crc32 as crc32
except ImportError:  # not installed, or a processor for which there is none
    from zlib import crc32 as crc32
