"""Numbers, sizes and times for people."""

from datetime import UTC, datetime


def now(precision: str = "seconds") -> str:
    """The time in UTC, ISO 8601, to the second or as datetime's timespec says."""
    return datetime.now(UTC).isoformat(timespec=precision)


def clock(seconds: float) -> str:
    """Seconds for people: 0:09, 1:02:03."""
    minutes, rest = divmod(max(1, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(number: float) -> str:
    """Bytes for people: 1.3 GB."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} GB"


def number(value: float, decimals: int = 3) -> str:
    """A score as tables show it: three decimals, fewer where it is large."""
    return f"{value:.{decimals}f}" if abs(value) < 100 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
