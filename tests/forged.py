"""Artifacts that are not what they claim."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlff_engines import manifest


def rewritten(path: Path, out: Path, change: Callable[[str, bytes], bytes], *, rehash: bool = True) -> Path:
    """`path` with every entry's content changed, and the manifest's hash made right again."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            if not info.filename.endswith(manifest.MANIFEST):
                new.writestr(info, change(info.filename, old.read(info)))
        name = next(name for name in old.namelist() if name.endswith(manifest.MANIFEST))
        said = change(name, old.read(name))
        if rehash and isinstance(content := json.loads(said), dict):
            said = json.dumps(content | {"sha256": manifest._digest(new, content)}).encode()
        new.writestr(name, said)
    return out


def remanifested(path: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """`path` with another manifest."""

    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith(manifest.MANIFEST):
            return content
        claims = json.loads(content)
        change(claims)
        return json.dumps(claims).encode()

    return rewritten(path, out, edit)


def off_by(path: Path, out: Path, difference: float) -> Path:
    """`path` whose golden forces are wrong by so much."""

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(manifest.GOLDEN):
            return content
        golden = json.loads(content)
        golden[-1]["forces"][0][0] += difference
        return json.dumps(golden).encode()

    return rewritten(path, out, change)
