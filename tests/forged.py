"""Artifacts that are not what they claim."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlff_engines import artifact


def rewritten(path: Path, out: Path, change: Callable[[str, bytes], bytes], *, rehash: bool = True) -> Path:
    """`path` with every entry's content changed, and the manifest's hash made right again."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            if not info.filename.endswith(artifact.MANIFEST):
                new.writestr(info, change(info.filename, old.read(info)))
        name = next(name for name in old.namelist() if name.endswith(artifact.MANIFEST))
        manifest = change(name, old.read(name))
        if rehash and isinstance(content := json.loads(manifest), dict):
            manifest = json.dumps(content | {"sha256": artifact._digest(new, content)}).encode()
        new.writestr(name, manifest)
    return out


def remanifested(path: Path, out: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """`path` with another manifest."""

    def edit(name: str, content: bytes) -> bytes:
        if not name.endswith(artifact.MANIFEST):
            return content
        manifest = json.loads(content)
        change(manifest)
        return json.dumps(manifest).encode()

    return rewritten(path, out, edit)


def off_by(path: Path, out: Path, difference: float) -> Path:
    """`path` whose golden forces are wrong by so much."""

    def change(name: str, content: bytes) -> bytes:
        if not name.endswith(artifact.GOLDEN):
            return content
        golden = json.loads(content)
        golden[-1]["forces"][0][0] += difference
        return json.dumps(golden).encode()

    return rewritten(path, out, change)
