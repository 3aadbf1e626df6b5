"""How our commands end: errors explained in a line, never a bare traceback for a user's mistake; exit codes.

0 done; 1 a run failed; 2 the user's input; 130 interrupted.
"""

import os
import sys
from collections.abc import Callable

from cruijff_kit.errors import UserError

DONE, RUN_FAILED, USER_ERROR, INTERRUPTED = 0, 1, 2, 130


class PastHydra(BaseException):
    """Carries a run's error through Hydra, which would print a report of its own for any Exception."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def run_command(command: Callable[[], object]) -> int:
    """Run a command and turn what it raises into a message on stderr and an exit code.

    With CRUIJFF_TRACEBACK=1 the traceback is shown too.
    """
    # Hydra would print its own, longer report; this makes it raise instead.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        command()
    except KeyboardInterrupt:
        return _end("interrupted; finished runs and their results are kept", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left, for example `| head`
        sys.stderr.close()
    except PastHydra as carried:
        return _explain(carried.error)
    except Exception as error:
        return _explain(error)
    return DONE


def _explain(error: Exception) -> int:
    from cruijff_kit.hints import explain

    message = explain(error)
    if message is not None:
        return _end(f"error: {message}", USER_ERROR)
    summary = " ".join(str(error).split())
    return _end(f"failed: {type(error).__name__}: {summary} (CRUIJFF_TRACEBACK=1 shows where)", RUN_FAILED)


def _end(message: str, code: int) -> int:
    if os.environ.get("CRUIJFF_TRACEBACK") == "1":
        import traceback

        traceback.print_exc()
    print(message, file=sys.stderr, flush=True)
    return code
