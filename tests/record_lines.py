"""Lines of records as lipprep writes them, to be changed one field at a time."""

import hashlib
import json
from pathlib import Path

CHECK = {"bytes": 0, "sha256": "0" * 64}


def header(**changed: object) -> dict:
    """The fields of a header that a stage gives; `commit` adds the others."""
    about = {"dataset": "m", "stage": "shards", "version": 1, "fps": 25.0, "parameters": {}, "rows": {}}
    about |= {"sources": None, "fingerprint": "f", "attempt": "0", "computed": 0, "end": 0, "parts": {}}
    return {**about, **changed}


def sound(key: str, **changed: object) -> dict:
    """The line of a clip that is in the tar."""
    entry = {"key": key, "status": "ok", "source": None, "inputs": "i", "parts": {}, "maker": "m"}
    entry |= {"figures": {"num_frames": 29}, "members": ["mouth.jpg", "json"], "crc32": 0, "offset": 0}
    return {**entry, **changed}


def failed(key: str, kind: str = "no_face", **changed: object) -> dict:
    """The line of a clip that is not."""
    entry = {"key": key, "status": "failed", "class": kind, "message": "why", "source": None, "inputs": "i"}
    return {**entry, "parts": {}, "maker": "m", "figures": {}, **changed}


def write(path: Path, about: dict, entries: list[dict] | bytes) -> None:
    """Write a record with digests that fit, whatever its fields are."""
    lines = entries if isinstance(entries, bytes) else b"".join(json.dumps(e).encode() + b"\n" for e in entries)
    if isinstance(about.get("entries"), dict) and about["entries"].keys() == CHECK.keys():
        about = {**about, "entries": {"bytes": len(lines), "sha256": hashlib.sha256(lines).hexdigest()}}
    body = {name: value for name, value in about.items() if name != "check"}
    check = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    path.write_bytes(json.dumps({**body, "check": check}).encode() + b"\n" + lines)
