"""The inspect-ai tasks that ship with cruijff_kit; `inspect eval cruijff_kit/NAME` finds them too.

`common.py` has the common part. A new task: a module here with an @task function, and its name in TASKS.
"""

import cruijff_kit.evaluation.scorers  # noqa: F401 (inspect-ai's entry point: scorers and metrics register themselves)
from cruijff_kit.evaluation.tasks.capitalization import capitalization
from cruijff_kit.evaluation.tasks.match import match
from cruijff_kit.evaluation.tasks.number import number
from cruijff_kit.evaluation.tasks.risk import numeric_risk, risk

TASKS = {t.__name__: t for t in (capitalization, match, number, numeric_risk, risk)}
