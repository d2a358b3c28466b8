"""What was measured of a network when its bundle was made."""

from __future__ import annotations

import json
from pathlib import Path


def metrics_of(bundle: Path) -> dict[str, float]:
    """Every number, by name."""
    return json.loads((bundle / "configs" / "metadata.json").read_text("utf-8"))["eval_metrics"]
