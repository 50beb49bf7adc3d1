"""What a complete checkpoint holds, to the bit: ``manifest.json``, written last, checked before anything is loaded.

It lists every file with its length and digest, and says which step, layout and versions of the code they belong to.
It carries a digest of itself, so a change in any of the files, this one included, is found and named.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE = "manifest.json"
_DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Digest:
    """Of a file's content. Example: ``Digest(bytes=10240, blake2b="9f86d081884c7d659a2feaa0c55ad015")``"""

    bytes: int
    blake2b: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """``files`` by name; ``facts`` is the rest: step, cursor, layout, versions and so on."""

    facts: dict[str, Any]
    files: dict[str, Digest]


def digest(path: Path) -> Digest:
    """Of a file, read in pieces."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES))
        return Digest(file.tell(), found.hexdigest())


def digest_durable(path: Path) -> Digest:
    """The same; the file is on disk when this returns."""
    _sync(path)
    return digest(path)


def digest_of_json(value: Any) -> str:
    """Of a value that JSON can hold, whatever the order of its keys."""
    data = json.dumps(value, sort_keys=True).encode()
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).hexdigest()


def write(folder: Path, manifest: Manifest) -> None:
    """On disk, with all that the folder lists, when this returns."""
    content = {
        **manifest.facts,
        "files": {n: {"bytes": d.bytes, "blake2b": d.blake2b} for n, d in manifest.files.items()},
    }
    with (folder / FILE).open("w") as file:
        json.dump({**content, "digest": digest_of_json(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read(folder: Path) -> Manifest | None:
    """None without one; ValueError, which names what is wrong, when it is not as it was written."""
    path = folder / FILE
    try:
        content = json.loads(path.read_bytes())
        if content.pop("digest") != digest_of_json(content):
            raise ValueError("its digest is another")
        files = {name: Digest(**found) for name, found in content.pop("files").items()}
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not as it was written ({error})") from error
    return Manifest(content, files)


def damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> list[str]:
    """What is wrong with the named files, a sentence each, in their order."""
    return [words for name in names if (words := _damage(folder / name, manifest.files[name]))]


def _damage(path: Path, expected: Digest) -> str | None:
    try:
        length = path.stat().st_size
        if length != expected.bytes:
            return f"{path} has {length} bytes, not {expected.bytes}"
        found = digest(path)
    except FileNotFoundError:
        return f"{path} is missing"
    except OSError as error:
        return f"{path} cannot be read ({error.strerror})"
    return None if found == expected else f"{path} is not as it was written (its digest is another)"


def sync_folder(folder: Path) -> None:
    """Names in a directory are durable only once it is synced itself."""
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
