"""Files that are there whole or not at all; what they hold is bounded, checked, and never run."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

import fsspec
import safetensors.torch
import torch
from torch import Tensor

PathLike = str | os.PathLike[str]

_KEY = "lightning_adalfl"  # one entry for all of it, since safetensors keeps several in no fixed order
_MAX_HEADER_BYTES = 1 << 16
_MAX_FILE_BYTES = 1 << 32  # an InfluenceTable of 170 million instances


@contextmanager
def atomic_write(path: PathLike) -> Iterator[BinaryIO]:
    """A binary file that takes its name only once it is complete, so that a crash never leaves half of one there.

    Args:
        path: A local path, or a URL that fsspec understands, such as ``"s3://bucket/run/loss.safetensors"``.
    """
    filesystem, path = _located(path)
    if filesystem.isdir(path):  # a move would put the file into it
        raise IsADirectoryError(f"cannot write {path}: it is a folder; give the path of a file.")
    filesystem.makedirs(os.path.dirname(path), exist_ok=True)
    # In the same folder, since a rename is atomic only within a file system; one for each process that writes there.
    partial = os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.{os.getpid()}.tmp")
    try:
        with filesystem.open(partial, "wb") as file:
            yield file
        filesystem.mv(partial, path)
    finally:
        if filesystem.exists(partial):
            filesystem.rm(partial)


def exists(path: PathLike) -> bool:
    """Return whether there is such a file."""
    filesystem, path = _located(path)
    return bool(filesystem.isfile(path))


def within(path: PathLike, name: str) -> PathLike:
    """Return the path of the file ``name`` where ``path`` is a folder, else ``path``."""
    filesystem, place = _located(path)
    return os.path.join(path, name) if filesystem.isdir(place) else path


def remove(path: PathLike) -> None:
    """Delete a file."""
    filesystem, path = _located(path)
    filesystem.rm(path)


def read_bytes(path: PathLike) -> bytes:
    """Return what a file holds.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is larger than any file of this package.
    """
    filesystem, place = _located(path)
    if not filesystem.isfile(place):
        what = "it is a folder; name the file" if filesystem.isdir(place) else "there is no such file; check the path"
        raise FileNotFoundError(f"cannot read {path}: {what}.")
    if (filesystem.size(place) or 0) > _MAX_FILE_BYTES:
        raise ValueError(f"cannot read {path}: it has more than {_MAX_FILE_BYTES:,} bytes; give another file.")
    return bytes(filesystem.cat_file(place))


def _located(path: PathLike) -> tuple[Any, str]:
    return fsspec.core.url_to_fs(os.fspath(path))


def write_tensors(
    path: PathLike, kind: str, version: int, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Write tensors with a header; a reader sees the old file or the new one, never half of one.

    Args:
        path: The file; its folder is made if need be.
        kind: What the file holds.
        version: Of the format of that kind.
        content: Plain values that JSON can hold.
        tensors: Of any device; equal ones give equal bytes.

    Raises:
        ValueError: If it would be larger than what :func:`read_tensors` accepts.
    """
    header = {_KEY: json.dumps({"kind": kind, "version": version, "crc32": _checksum(tensors), **content})}
    data = safetensors.torch.save({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, header)
    if len(data) > _MAX_FILE_BYTES or _header_bytes(data) > _MAX_HEADER_BYTES:
        raise ValueError(f"cannot write {path}: a {kind} of {len(data):,} bytes is larger than what can be read again.")
    with atomic_write(path) as file:
        file.write(data)


def read_tensors(path: PathLike, kind: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the content and the tensors of a file that :func:`write_tensors` wrote.

    Args:
        path: The file.
        kind: What it must hold.
        version: The newest format of that kind that the caller understands.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, too large, of another kind, or of a newer format.
    """
    data = read_bytes(path)
    content = _content(path, data)
    if content.get("kind") != kind:
        raise ValueError(f"cannot read {path}: it holds {content.get('kind')!r} and not a {kind!r}; give another file.")
    found = content.get("version")
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"cannot read {path}: its format version {found!r} is no positive number; save it again.")
    if found > version:
        raise ValueError(
            f"cannot read {path}: its format version {found} is newer than {version}, which this version of "
            "lightning_adalfl reads; upgrade lightning_adalfl."
        )
    try:
        tensors = safetensors.torch.load(data)
    except Exception as error:  # whatever safetensors and torch make of bytes that are not theirs
        raise ValueError(_corrupt(path, error)) from error
    if content.pop("crc32", None) != _checksum(tensors):
        raise ValueError(_corrupt(path, "its checksum does not fit what it holds"))
    return content, tensors


def kind_of(path: PathLike) -> str:
    """Return what a file holds, by its header.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, too large, or not of this package.
    """
    return str(_content(path, read_bytes(path)).get("kind"))


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    """Return the CRC-32 of the tensors, where a flipped bit would not show otherwise."""
    value = 0
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        value = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().tobytes(), value)
    return value


def _header_bytes(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _content(path: PathLike, data: bytes) -> dict[str, Any]:
    size = _header_bytes(data)
    if data.startswith(b"PK\x03\x04"):
        remedy = "take its learned loss by `lightning_adalfl.inspection.read(path).loss_at(0)` and `save` it"
        raise ValueError(f"cannot read {path}: it is a zip archive, as checkpoints are; {remedy}.")
    if size > min(_MAX_HEADER_BYTES, len(data) - 8):
        raise ValueError(_corrupt(path, f"its header of {size:,} bytes is cut off or too large"))
    try:
        content = json.loads(json.loads(data[8 : 8 + size])["__metadata__"][_KEY])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(_corrupt(path, f"it has no header of lightning_adalfl, {type(error).__name__}")) from error
    if not isinstance(content, dict):
        raise ValueError(_corrupt(path, "its header holds no named values"))
    return content


def _corrupt(path: PathLike, why: object) -> str:
    return (
        f"cannot read {path}: it is truncated, corrupt, or was not written by lightning_adalfl ({why}); "
        "restore it from a copy, or save it again."
    )
