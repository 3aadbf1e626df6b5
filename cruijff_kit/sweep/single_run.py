"""Check and run one run from Hydra's composed config: Hydra calls these for a single run, and the local launcher."""

from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cruijff_kit.analysis.results_table import record_or_show
from cruijff_kit.config.run import RunConfig
from cruijff_kit.records.run_folder import RunFolder, discard_unused
from cruijff_kit.runs.estimate import check_budget, estimate_runs
from cruijff_kit.runs.plan import plan_run
from cruijff_kit.runs.run import train_then_eval
from cruijff_kit.sweep.dry_run import show
from cruijff_kit.sweep.on_slurm import submit_single
from cruijff_kit.sweep.scaffold import scaffold_single
from cruijff_kit.sweep.task_config import load_task, start_output, swept, warn_ignored_overrides
from cruijff_kit.util.errors import InnerError, UserError

if TYPE_CHECKING:
    from cruijff_kit.runs.plan import RunPlan


def check_single(cfg: DictConfig) -> None:
    """Check a single run, or show it (dry_run), before Hydra makes its folder.

    Args:
        cfg: as composed, with the ``hydra`` node.
    Raises:
        InnerError: carries a UserError: the run cannot work.
        SystemExit: with code 0, after a dry run, and after a run that was submitted to SLURM.
    """
    try:
        HydraConfig.instance().set_config(cfg)  # for what refers to ${hydra:...}
        _refuse_sweep_without_flag(cfg)
        config = load_task(cfg.copy(), str(cfg.hydra.run.dir))
        warn_ignored_overrides(config, list(cfg.hydra.overrides.task))
        if config.dry_run:
            _show(config, Path(config.output_dir))
        elif config.scaffold:
            scaffold_single(config)
        elif config.slurm.submit:
            submit_single(config)
        else:
            _check_budget(config, plan_run(config))
            return
    except Exception as error:
        raise InnerError(error) from error
    raise SystemExit(0)


def _check_budget(config: RunConfig, plan: "RunPlan") -> None:
    if config.max_gpu_hours is not None:
        check_budget(config, estimate_runs([(config, plan)], Path(config.output_dir)))


def _refuse_sweep_without_flag(cfg: DictConfig) -> None:
    """Refuse an experiment without -m, unless the shell fixes all that it sweeps: then it is one run."""
    experiment = cfg.hydra.runtime.choices.get("experiment")
    if experiment is None:
        return
    sweeper = OmegaConf.to_container(cfg.hydra.sweeper)
    typed = {o.lstrip("+~").partition("=")[0] for o in OmegaConf.to_container(cfg.hydra.overrides.task)}
    keys = [key for key in sweeper.get("params") or {} if key not in typed]
    if keys or sweeper.get("runs"):
        description = f"sweeps over {', '.join(keys)}" if keys else f"lists {len(sweeper['runs'])} runs"
        raise UserError(
            f"experiment={experiment} {description}; add -m" + (f", or set {keys[0]}=VALUE" if keys else "")
        )


def run_task(cfg: DictConfig) -> float | None:
    """Run one run in the folder that Hydra created for it; return its objective.

    Raises:
        UserError: the config cannot work (in a sweep; a single run's error is carried past Hydra).
        Exception: whatever failed in the run; its result.json says more.
    """
    hydra = HydraConfig.get()
    if hydra.mode is RunMode.MULTIRUN:
        return _run(load_task(cfg, hydra.runtime.output_dir), Path(str(hydra.sweep.dir)))
    try:
        return _run_single(load_task(cfg, hydra.runtime.output_dir))
    except Exception as error:
        raise InnerError(error) from error
    finally:
        discard_unused(hydra.runtime.output_dir)


def _run(config: RunConfig, folder: Path) -> float | None:
    if config.dry_run:  # under a launcher that is not ours
        _show(config, folder)
        return None
    start_output(folder)
    return train_then_eval(config, swept.get()).objective


def _show(config: RunConfig, folder: Path) -> None:
    show([(config, {})], folder)


def _run_single(config: RunConfig) -> float | None:
    try:
        return _run(config, Path(config.output_dir))
    finally:
        if RunFolder(config.output_dir).result.exists():
            record_or_show(Path(config.output_dir))
