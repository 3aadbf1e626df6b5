"""`python -m cruijff_kit COMMAND ...`: the same as `cruijff-kit COMMAND ...`."""

from cruijff_kit.commands.main import main

if __name__ == "__main__":
    raise SystemExit(main())
