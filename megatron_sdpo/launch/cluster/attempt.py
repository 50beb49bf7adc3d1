"""The files of one attempt (``RUN_DIR/slurm/attempt-N/``), through which its nodes and the conductor speak.

``facts/NODE.json``, ``alive/NODE``, ``measured/NODE.json``, ``failed/NODE.json`` and ``done/NODE`` are each written by
one node; ``canary``, ``orders/NAME.json`` and ``end`` by the conductor. Files appear whole.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Attempt:
    """Example: ``Attempt(Path("runs/70b/slurm/attempt-001"))``"""

    path: Path

    def write(self, name: str, value: Any) -> None:
        """``name`` is relative, e.g. ``orders/run.json``."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(json.dumps(value))
        temporary.replace(path)

    def read(self, name: str) -> Any:
        """None where it is not there (yet)."""
        try:
            return json.loads((self.path / name).read_text())
        except FileNotFoundError:
            return None

    def read_all(self, folder: str) -> dict[str, Any]:
        """What every node has written there, by node."""
        names = [path.name for path in (self.path / folder).glob("[!.]*")]
        found = {name.removesuffix(".json"): self.read(f"{folder}/{name}") for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def ended(self) -> bool:
        return (self.path / "end").exists()
