"""A short hash of plain values."""

import hashlib
import json


def digest_of(value: object) -> str:
    """Returns a short digest of JSON values, to compare them between ranks and runs."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
