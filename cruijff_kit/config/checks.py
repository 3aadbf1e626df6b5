"""Checks of a setting's value; each raises a UserError of one line. The groups call them."""

from cruijff_kit.util.errors import UserError


def require(ok: bool, message: str) -> None:
    """Raise UserError with the message unless `ok`."""
    if not ok:
        raise UserError(message)


def at_least(low: float, **values: float | None) -> None:
    """Require that each value (its key with __ for the dot) is None, or finite and at least `low`."""
    for name, value in values.items():
        ok = value is None or low <= value < float("inf")
        require(ok, f"{name.replace('__', '.')} must be at least {low}, not {value}")


def above_zero(name: str, value: float, hint: str = "") -> None:
    """Require that a value is above 0 and finite."""
    require(0 < value < float("inf"), f"{name} must be above 0 and finite, not {value}{hint}")


def one_of(name: str, value: str, valid: tuple[str, ...]) -> None:
    """Require that a value is one of a few names."""
    require(value in valid, f"{name}={value} does not exist; valid: {', '.join(valid)}")
