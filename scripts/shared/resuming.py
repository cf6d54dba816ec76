"""Long work in pieces: each is done once, and what a file holds already is not done again."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from turns import machine

import jaxnn


def run_pieces(
    path: Path, settings: Mapping[str, Any], pieces: Mapping[str, Callable[[], Any]]
) -> dict[str, Any]:
    """Facts of every piece: read from the file, or found and added to it.

    Args:
        path: a JSON file, written anew after each piece.
        settings: what the facts depend on; a file of other settings, or of another version of
            the package, is refused.
        pieces: functions that find the facts, by name; each returns what JSON can hold.

    Returns:
        `{name: facts}`, in the order of the pieces, each with the `seconds` that it took.

    Raises:
        ValueError: if the file was written with other settings, or by another version.
        SystemExit: with 130, after Ctrl-C.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({**settings, "package": checksum()}))
    kept: dict[str, Any] = {"settings": settings, "machine": machine(), "pieces": {}}
    if path.exists():
        kept = json.loads(path.read_text())
        if not isinstance(kept, dict) or kept.get("settings") != settings:
            raise ValueError(
                f"{path} is of other settings, or of another version of the package: "
                "name another --output"
            )
    for name, find in (bar := tqdm(pieces.items(), unit=" pieces")):
        if name not in kept["pieces"]:
            bar.set_postfix_str(name)
            started = time.perf_counter()
            try:
                facts = find()
            except KeyboardInterrupt:
                bar.close()
                print(f"interrupted: the same command goes on from {path.parent}", file=sys.stderr)
                raise SystemExit(130) from None
            kept["pieces"][name] = {**facts, "seconds": time.perf_counter() - started}
            _write(path, kept)
    return {name: kept["pieces"][name] for name in pieces}


def checksum() -> str:
    """Of the source of the package."""
    source = hashlib.sha256()
    for path in sorted(Path(jaxnn.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return source.hexdigest()[:16]


def finished(result: Any) -> Any:
    """A trainer's result, of one network or of many, unless Ctrl-C cut it short.

    Raises:
        KeyboardInterrupt: if it did.
    """
    if np.any(np.asarray(result.status) == "interrupted"):
        raise KeyboardInterrupt
    return result


def _write(path: Path, facts: Mapping[str, Any]) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(facts, indent=1, allow_nan=False))
    os.replace(part, path)
