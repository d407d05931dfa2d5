"""Trees of files, local or remote: what is in them, and bytes of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, cast


@dataclass(frozen=True)
class Piece:
    """A file: its name from the root, with slashes; its size; and a stamp that changes with it."""

    name: str
    nbytes: int
    stamp: str


@dataclass
class Listing:
    """``pieces`` by name; ``links`` are names that lead to other files, with the name those have if
    they are listed, too; ``refused`` are names that are left alone, with the reason."""

    pieces: dict[str, Piece]
    links: dict[str, str | None]
    refused: dict[str, str]


class Tree(Protocol):
    def list(self) -> Listing:
        """All regular files, but none whose name, or a directory's, starts with a dot; `.metadata`
        is listed. Raises OSError."""

    def open(self, name: str) -> IO[bytes]: ...

    def locate(self, name: str) -> str:
        """The path of a local file, the URL of a remote one."""


def is_remote(root: str) -> bool:
    return "://" in root


def open_tree(root: str, exclude: str | None = None) -> Tree:
    """The tree at a path or an fsspec URL, without what is in the local directory ``exclude``."""
    return RemoteTree(root) if is_remote(root) else LocalTree(root, exclude)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") and name != ".metadata"


class LocalTree:
    """Links to files are followed within the root, links to directories never."""

    def __init__(self, root: str, exclude: str | None = None) -> None:
        self._root = Path(root).resolve(strict=True)
        self._exclude = None if exclude is None else Path(exclude).resolve()

    def list(self) -> Listing:
        listing = Listing({}, {}, {})
        for folder, names, files in os.walk(self._root, onerror=_raise):
            here = Path(folder)
            for name in [n for n in names if (here / n).is_symlink()]:
                listing.refused[self._name(here / name)] = "a link to a directory"
            names[:] = sorted(n for n in names if not _is_hidden(n) and (here / n) != self._exclude)
            for name in sorted(n for n in files if not _is_hidden(n)):
                self._add(listing, here / name)
        return listing

    def _add(self, listing: Listing, path: Path) -> None:
        name = self._name(path)
        try:
            if path.is_symlink():
                real = path.resolve(strict=True)
                if not real.is_relative_to(self._root):
                    listing.refused[name] = "a link that leads out of the zoo"
                    return
                listing.links[name] = self._name(real)
            if path.is_file():  # no pipe, socket or device
                status = path.stat()
                listing.pieces[name] = Piece(name, status.st_size, str(status.st_mtime_ns))
        except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            listing.refused[name] = f"cannot be read: {error}"

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def open(self, name: str) -> IO[bytes]:
        return (self._root / name).open("rb")

    def locate(self, name: str) -> str:
        return str(self._root / name)


def _raise(error: OSError) -> None:
    raise error


class RemoteTree:
    """Whatever fsspec reads: S3, HTTP, Hugging Face, ..."""

    def __init__(self, root: str) -> None:
        try:
            import fsspec
        except ImportError:
            raise ImportError('URLs need fsspec: pip install "fastsd[zoo]"') from None
        self._files, base = fsspec.core.url_to_fs(root)
        self._base = base.rstrip("/")
        self._only = ""
        if self._files.isfile(self._base):
            self._base, _, self._only = self._base.rpartition("/")

    def list(self) -> Listing:
        listing = Listing({}, {}, {})
        start = self._path(self._only) if self._only else self._base
        for path, info in sorted(self._files.find(start, detail=True).items()):
            name = path.removeprefix(self._base).lstrip("/")
            parts = PurePosixPath(name).parts
            if ".." in parts:
                listing.refused[name] = "a name that leads out of the zoo"
            elif not any(map(_is_hidden, parts)):
                listing.pieces[name] = Piece(name, int(info.get("size") or 0), _stamp(info))
        return listing

    def open(self, name: str) -> IO[bytes]:
        return cast(IO[bytes], self._files.open(self._path(name), "rb"))

    def fetch(self, name: str, target: str) -> None:
        """Copies a file to a local path. Raises OSError, and what the file system raises."""
        with self.open(name) as source, open(target, "wb") as copy:
            shutil.copyfileobj(source, copy, 8 << 20)

    def locate(self, name: str) -> str:
        return cast(str, self._files.unstrip_protocol(self._path(name)))

    def _path(self, name: str) -> str:
        return f"{self._base}/{name}"


def _stamp(info: dict[str, Any]) -> str:
    # Each file system has its own name for what changes with a file.
    keys = (
        "ETag",
        "etag",
        "md5Hash",
        "blob_id",
        "LastModified",
        "last_modified",
        "mtime",
        "created",
    )
    return next((str(info[key]) for key in keys if info.get(key)), "")


def iterate_bytes(path: str | os.PathLike[str], nbytes: int = 4 << 20) -> Iterator[memoryview]:
    """A file's bytes, in pieces that are overwritten by the next."""
    buffer = memoryview(bytearray(nbytes))
    with open(path, "rb", buffering=0) as file:
        while got := file.readinto(buffer):
            yield buffer[:got]
