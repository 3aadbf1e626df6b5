"""From Hydra's composed config to one run: what the command, the launcher and a job on a cluster all call."""

import contextlib
import contextvars
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from cruijff_kit import answer
from cruijff_kit.command import PastHydra
from cruijff_kit.config import RunConfig, load
from cruijff_kit.errors import UserError
from cruijff_kit.folder import RunFolder, discard_unused
from cruijff_kit.progress import say
from cruijff_kit.table import no_data

if TYPE_CHECKING:
    from cruijff_kit.plan import Plan

# The launcher knows what varies in the sweep; Hydra's task function takes the config alone.
_swept: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("swept", default={})  # noqa: B039 (never written)


@contextlib.contextmanager
def swept_by(values: dict[str, Any]) -> Iterator[None]:
    """Within this context, runs are told that these values distinguish them in their sweep."""
    token = _swept.set(values)
    try:
        yield
    finally:
        _swept.reset(token)


def warn_of_ignored(config: RunConfig, typed: list[str]) -> None:
    """Say so where something of the slurm group was typed for a run that is made here."""
    keys = [o.lstrip("+").partition("=")[0] for o in typed]
    asked = [k for k in keys if k.startswith("slurm.") and k != "slurm.submit"]
    if asked and not config.slurm.submit:
        say(f"{', '.join(asked)}: without effect, because the run is made here; slurm=cluster submits it")


def load_task(cfg: DictConfig, output_dir: str) -> RunConfig:
    """The typed config of a run whose folder is known. Raises UserError as config.load."""
    with read_write(cfg), open_dict(cfg):
        cfg.output_dir = str(Path(output_dir).absolute())
    return load(cfg)


def begin_answer(folder: Path) -> None:
    """What the command answers to a program has these keys whatever comes of the runs. (Once per batch of a sweep.)"""
    answer.record(folder=str(folder.absolute()), **no_data())
    answer.extend(submitted=[], existing=[])


def check_alone(cfg: DictConfig) -> None:
    """Check a single run, or show it (dry_run), before Hydra makes its folder.

    Args:
        cfg: as composed, with the ``hydra`` node.
    Raises:
        PastHydra: carries a UserError: the run cannot work.
        SystemExit: with code 0, after a dry run, and after a run that was submitted to SLURM.
    """
    from cruijff_kit.plan import check

    try:
        HydraConfig.instance().set_config(cfg)  # for what refers to ${hydra:...}
        _refuse_sweep_alone(cfg)
        config = load_task(cfg.copy(), str(cfg.hydra.run.dir))
        warn_of_ignored(config, list(cfg.hydra.overrides.task))
        if config.dry_run:
            _show(config, Path(config.output_dir))
        elif config.scaffold:
            from cruijff_kit.launch.scaffold import scaffold_alone

            scaffold_alone(config)
        elif config.slurm.submit:
            from cruijff_kit.launch.cluster import submit_alone

            submit_alone(config)
        else:
            _check_budget(config, check(config))
            return
    except Exception as error:
        raise PastHydra(error) from error
    raise SystemExit(0)


def _check_budget(config: RunConfig, plan: "Plan") -> None:
    from cruijff_kit.estimate import check_budget, estimates

    if config.max_gpu_hours is not None:
        check_budget(config, estimates([(config, plan)], Path(config.output_dir)))


def _refuse_sweep_alone(cfg: DictConfig) -> None:
    """An experiment without -m is one run only if the shell fixes all that it sweeps."""
    chosen = cfg.hydra.runtime.choices.get("experiment")
    if chosen is None:
        return
    sweeper = OmegaConf.to_container(cfg.hydra.sweeper)
    typed = {o.lstrip("+~").partition("=")[0] for o in OmegaConf.to_container(cfg.hydra.overrides.task)}
    swept = [key for key in sweeper.get("params") or {} if key not in typed]
    if swept or sweeper.get("runs"):
        what = f"sweeps over {', '.join(swept)}" if swept else f"lists {len(sweeper['runs'])} runs"
        raise UserError(f"experiment={chosen} {what}; add -m" + (f", or set {swept[0]}=VALUE" if swept else ""))


def run_task(cfg: DictConfig) -> float | None:
    """One run in the folder that Hydra made for it; returns its objective.

    Raises:
        UserError: the config cannot work (in a sweep; a single run's error is carried past Hydra).
        Exception: whatever failed in the run; its result.json says more.
    """
    hydra = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN:
        return _run(load_task(cfg, hydra.runtime.output_dir), Path(str(hydra.sweep.dir)))
    try:
        return _run_alone(load_task(cfg, hydra.runtime.output_dir))
    except Exception as error:
        raise PastHydra(error) from error
    finally:
        discard_unused(hydra.runtime.output_dir)


def _run(config: RunConfig, folder: Path) -> float | None:
    from cruijff_kit.run import train_then_eval

    if config.dry_run:  # under a launcher that is not ours
        return _show(config, folder)
    begin_answer(folder)
    return train_then_eval(config, _swept.get()).objective


def _show(config: RunConfig, folder: Path) -> None:
    from cruijff_kit.launch.dry_run import show

    show([(config, {})], folder)


def _run_alone(config: RunConfig) -> float | None:
    try:
        return _run(config, Path(config.output_dir))
    finally:
        if RunFolder(config.output_dir).result.exists():
            from cruijff_kit.table import answer_or_show

            answer_or_show(Path(config.output_dir))
