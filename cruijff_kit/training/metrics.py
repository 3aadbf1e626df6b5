"""Write metrics.jsonl, one JSON object per logged step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """A torchtune metric logger (its MetricLoggerInterface) that writes `log_dir`/metrics.jsonl, a line per step.

    Each line is flushed, so that readers see whole lines during the run. `append` keeps the existing lines.
    """

    def __init__(self, log_dir: str, filename: str = "metrics.jsonl", append: bool = False) -> None:
        self.path = Path(log_dir) / filename
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a" if append else "w", encoding="utf-8")

    def log(self, name: str, data: float, step: int) -> None:
        """Write one value."""
        self.log_dict({name: data}, step)

    def log_config(self, config: Any) -> None:
        """Do nothing: torchtune's interface requires this method, and the run's folder holds the config."""

    def log_dict(self, payload: Mapping[str, float], step: int) -> None:
        """Write one step's values."""
        self._file.write(json.dumps({"step": step, **payload}) + "\n")
        self._file.flush()

    def tell(self) -> int:
        """Return the size of the file in bytes."""
        return self._file.tell()

    def rewind(self, size: int) -> int:
        """Truncate the file to `size` bytes; return the number of lines removed."""
        num_lines = self.path.read_bytes()[size:].count(b"\n")
        self._file.truncate(size)
        self._file.seek(size)
        return num_lines

    def lines(self) -> list[dict[str, float]]:
        """Read all lines of the file."""
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def close(self) -> None:
        """Close the file; safe to call again."""
        self._file.close()
