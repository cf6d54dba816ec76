"""Long work in pieces: each piece is done once, and its results are read from a file after that."""

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

import jaxnn
from shared.timing import machine


def run_pieces(
    path: Path, settings: Mapping[str, Any], pieces: Mapping[str, Callable[[], dict[str, Any]]]
) -> dict[str, Any]:
    """Return the results of every piece, read from a JSON file or found now and added to it.

    Each piece is a function that returns what JSON can hold; its results also say the `seconds`
    that it took. After Ctrl-C the next call goes on; a file of other settings, or of another
    version of jaxnn, is refused with a `ValueError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps({**settings, "package": checksum()}))
    saved: dict[str, Any] = {"settings": settings, "machine": machine(), "pieces": {}}
    if path.exists():
        saved = json.loads(path.read_text())
        if not isinstance(saved, dict) or saved.get("settings") != settings:
            raise ValueError(
                f"{path} holds other settings, or results of another version of jaxnn: "
                "name another --output"
            )
    for name, find in (bar := tqdm(pieces.items(), unit=" pieces")):
        if name not in saved["pieces"]:
            bar.set_postfix_str(name)
            started = time.perf_counter()
            try:
                results = find()
            except KeyboardInterrupt:
                bar.close()
                print(f"interrupted: the same command goes on from {path.parent}", file=sys.stderr)
                raise SystemExit(130) from None
            saved["pieces"][name] = {**results, "seconds": time.perf_counter() - started}
            part = path.with_name(path.name + ".part")
            part.write_text(json.dumps(saved, indent=1, allow_nan=False))
            os.replace(part, path)
    return {name: saved["pieces"][name] for name in pieces}


def checksum() -> str:
    """Return a checksum of the package's source."""
    source = hashlib.sha256()
    for path in sorted(Path(jaxnn.__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    return source.hexdigest()[:16]
