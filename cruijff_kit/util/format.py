"""Format numbers, sizes and times for people."""

from datetime import UTC, datetime


def now(precision: str = "seconds") -> str:
    """Return the time in UTC, ISO 8601.

    Args:
        precision: as `timespec` of datetime.isoformat.
    """
    return datetime.now(UTC).isoformat(timespec=precision)


def format_duration(seconds: float) -> str:
    """Format seconds for people, rounded, at least one: 0:09, 1:02:03."""
    return format_clock(max(1, round(seconds)))


def format_clock(seconds: int) -> str:
    """Format whole seconds: 0:00, 1:02:03."""
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_size(amount: float) -> str:
    """Format bytes for people: 1.3 GB."""
    for unit in ("B", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"


def format_number(value: float, decimals: int = 3) -> str:
    """Format a score for tables: three decimals, fewer where it is large."""
    return f"{value:.{decimals}f}" if abs(value) < 100 else f"{value:.1f}" if abs(value) < 1000 else f"{value:.0f}"
