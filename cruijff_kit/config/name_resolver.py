"""Draw a readable name, adjective_noun, for a run without one, from its command and its seed."""

import random
from collections.abc import Sequence

from cruijff_kit.config.overrides import parse_override

# The name does not depend on these: they set where and how the run is executed and reported, not what it computes.
_IGNORED = ("hydra", "run_name", "output_dir", "slurm", "agent", "report", "dry_run", "scaffold", "approved",
          "max_gpu_hours", "force", "multi_lora", "resume_from_checkpoint", "trackers")  # fmt: skip


def readable_name(overrides: Sequence[str], seed: int) -> str:
    """Return a name such as ``juicy_polecat``; the same settings in any order and the same seed give the same name.

    Args:
        overrides: as they were typed.
        seed: the run's.
    """
    import coolname
    from coolname.data import config as words

    # A sweeper may write a value in another way than the user: 0.001 for 1e-3.
    settings = sorted(
        str((o.key_or_group, o.value())) for o in map(parse_override, overrides) if not _is_ignored(o.key_or_group)
    )
    return "_".join(coolname.RandomGenerator(words, random.Random(f"{seed} {settings}")).generate(2))  # type: ignore[arg-type]


def _is_ignored(key: str) -> bool:
    return key.partition(".")[0].partition("/")[0] in _IGNORED
