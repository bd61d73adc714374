"""A strict walk over the members of a tar archive, without extracting anything.

Python's tarfile takes a damaged header for the end of the archive and so loses samples without a
word. Here every header must be right: checksum, type, name, size, and the two empty blocks at the
end. Only regular files with plain names pass, and folders are passed over. Of the extensions those
are accepted that change neither size nor type: PAX headers of one member or of all, which may give a
longer name, and GNU's long names. A `./` before a name, as tar writes it, is no part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
MAX_MEMBER_BYTES = 1 << 28
MAX_PAX_BYTES = 4096
HARMLESS_PAX = {"mtime", "atime", "ctime", "uid", "gid", "uname", "gname", "comment"}
NAME = re.compile(r"(?:[A-Za-z0-9_][A-Za-z0-9_-]*/)*[A-Za-z0-9_][A-Za-z0-9_-]*(?:\.[A-Za-z0-9_]+)+")
MAX_NAME = 255
EXTENSIONS = (b"x", b"g", b"L")  # PAX of one member, PAX of all, GNU's long name
TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"7": "a contiguous file",
    b"S": "a sparse file",
    b"K": "a GNU long link name",
    b"V": "a volume label",
    b"M": "a multi-volume continuation",
}


class MemberError(ValueError):
    """A member that is damaged or not allowed; the text is a reason without its place."""


class Member(NamedTuple):
    """One regular file. All numbers are byte positions in the archive; [start, stop) includes
    headers and padding.
    """

    name: str
    start: int
    data: int
    size: int
    stop: int


def members(buffer: memoryview, any_name: bool = False) -> Iterator[Member]:
    """The members of the archive in `buffer`, in order. Raises MemberError at the first thing that
    is not right.

    any_name: names are not looked at; nothing may be made of them but text.
    """
    position = 0
    start: int | None = None  # where the member's extension headers begin, if it has any
    kinds, renamed = b"", ""
    while True:
        header = bytes(buffer[position : position + BLOCK])
        if len(header) < BLOCK:
            raise MemberError("the archive ends in the middle of a header (truncated)")
        if header == bytes(BLOCK):
            if start is not None:
                raise MemberError("an extension header is followed by no member")
            _check_end(buffer, position)
            return
        kind, name, size = _header(header)
        data = position + BLOCK
        stop = data + -(-size // BLOCK) * BLOCK
        if stop > len(buffer):
            raise MemberError("the archive ends in the middle of a member (truncated)")
        body = bytes(buffer[data : data + size]) if kind in EXTENSIONS else b""
        if kind == b"g":
            _check_pax(body, HARMLESS_PAX)
        elif kind in EXTENSIONS:
            if kind in kinds:
                raise MemberError("two extension headers in a row")
            long = _text(body) if kind == b"L" else _check_pax(body, HARMLESS_PAX | {"path"})
            start = position if start is None else start
            kinds, renamed = kinds + kind, long or renamed
        else:
            name = (renamed or name).removeprefix("./")
            if kind == b"5" and size:
                raise MemberError(f"the folder {name[:80]!r} has {size} bytes")
            if kind == b"0":
                if not any_name:
                    _check_name(name)
                yield Member(name, position if start is None else start, data, size, stop)
            start, kinds, renamed = None, b"", ""
        position = stop


def _header(header: bytes) -> tuple[bytes, str, int]:
    """(type, name, size) of one header block."""
    checksum = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if _octal(header[148:156], "checksum") != checksum:
        raise MemberError("the checksum of a tar header does not fit (damaged)")
    posix = header[257:263] == b"ustar\0"
    if not posix and header[257:265] != b"ustar  \0":
        raise MemberError("a header is not of the ustar kind")
    kind = b"0" if header[156:157] == b"\0" else header[156:157]
    if kind not in (b"0", b"5", *EXTENSIONS):
        raise MemberError(f"holds {TYPES.get(kind, f'type {kind!r}')}; only regular files may be")
    name = _text(header[:100])
    prefix = _text(header[345:500]) if posix else ""
    size = _octal(header[124:136], "size")
    limit = MAX_PAX_BYTES if kind in EXTENSIONS else MAX_MEMBER_BYTES
    if size > limit:
        raise MemberError(f"a member of {size} bytes is larger than the limit of {limit}")
    return kind, f"{prefix}/{name}" if prefix else name, size


def _octal(field: bytes, what: str) -> int:
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]{1,12}", digits):
        raise MemberError(f"the {what} in a tar header is not an octal number")
    return int(digits, 8)


def _text(field: bytes) -> str:
    text, _, rest = field.partition(b"\0")
    if rest.strip(b"\0"):
        raise MemberError("a member's name goes on after a NUL")
    return text.decode("ascii", errors="backslashreplace")


def _check_name(name: str) -> None:
    if len(name) > MAX_NAME or not NAME.fullmatch(name):
        raise MemberError(
            f"the member name {name[:80]!r} is not allowed (only letters, digits, '_' and '-', "
            "folders below, and plain endings)"
        )


def _check_pax(body: bytes, allowed: set[str]) -> str:
    """The name that the header gives, or nothing. Raises MemberError for what is not `allowed`: a size or a type
    could hide a member.
    """
    name = ""
    while body:
        length, space, _ = body.partition(b" ")
        if not space or not re.fullmatch(rb"[1-9][0-9]{0,4}", length):
            raise MemberError("a PAX header is damaged")
        record, body = body[: int(length)], body[int(length) :]
        key, equals, value = record[len(length) + 1 :].partition(b"=")
        if len(record) != int(length) or not equals or not record.endswith(b"\n"):
            raise MemberError("a PAX header is damaged")
        if key.decode("ascii", errors="backslashreplace") not in allowed:
            raise MemberError(f"a PAX header overrides {key[:40]!r}")
        if key == b"path":
            name = _text(value[:-1])
    return name


def _check_end(buffer: memoryview, position: int) -> None:
    rest = buffer[position:]
    if len(rest) < 2 * BLOCK:
        raise MemberError("the archive has no end mark (truncated)")
    if any(bytes(rest)):
        raise MemberError("something follows the end mark of the archive")
