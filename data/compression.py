"""Files opened to read what they hold: on disk or on the Hub, compressed or not."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from nanophi.core.errors import UserError
from nanophi.core.names import shown

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_MAGIC = {b"\x1f\x8b": ".gz", b"BZh91AY": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst", b"PAR1": ".parquet"}
_CHUNK = 1 << 20


def suffixes(name: str) -> tuple[str, str]:
    """`(.jsonl, .gz)` of `x.jsonl.gz`; tables that compress their own contents are not compressed again."""
    path = Path(name.lower())
    if path.suffix not in _COMPRESSIONS:
        return path.suffix, ""
    inner = Path(path.stem).suffix
    return ("" if inner in (".parquet", ".arrow") else inner), path.suffix


def open_file(location: str) -> Any:
    """A file on disk or, for `hf://...`, on the Hub, opened to read bytes."""
    if not location.startswith("hf://"):
        return Path(location).open("rb")
    from huggingface_hub import HfFileSystem

    return io.BufferedReader(HfFileSystem().open(location, "rb"), _CHUNK)


def open_plain(location: str) -> Any:
    """A file opened to read its uncompressed bytes."""
    compression = suffixes(location)[1]
    if compression == "":
        file = open_file(location)
        for suffix in (suffix for magic, suffix in _MAGIC.items() if file.peek(8).startswith(magic)):
            raise UserError(f"{shown(location)} holds what {suffix} files hold; rename it to end in {suffix}")
        return file
    if compression == ".gz":
        return gzip.open(open_file(location), "rb")
    if compression == ".zst":
        return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(open_file(location), "r"), "zstd"), _CHUNK)
    new_stream = {".bz2": bz2.BZ2Decompressor, ".xz": lzma.LZMADecompressor}[compression]
    return io.BufferedReader(_Streams(open_file(location), new_stream), _CHUNK)


class _Streams(io.RawIOBase):
    """What all streams of a .bz2 or .xz file hold, or an error if it holds anything else.

    Python's own readers take a damaged stream that is not the first for the end of the file.
    """

    def __init__(self, file: Any, new_stream: Callable[[], Any]) -> None:
        self.chunks, self.pending = self._decompress(file, new_stream), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self.pending = self.pending or next(self.chunks, b"")
        data, self.pending = self.pending[: len(buffer)], self.pending[len(buffer) :]
        buffer[: len(data)] = data
        return len(data)

    @staticmethod
    def _decompress(file: Any, new_stream: Callable[[], Any]) -> Iterator[bytes]:
        stream = None
        while raw := file.read(_CHUNK):
            while raw:
                if stream is None:
                    raw = raw.lstrip(b"\0")  # streams may be padded
                    if not raw:
                        break
                    stream = new_stream()
                data, raw = stream.decompress(raw), b""
                if stream.eof:
                    raw, stream = stream.unused_data, None
                if data:
                    yield data
        if stream is not None:
            raise EOFError("the file ends before its end-of-stream mark")
