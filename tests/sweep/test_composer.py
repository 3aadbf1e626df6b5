"""Composing quickly gives what Hydra gives."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import initialize_config_module
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from cruijff_kit.config.loading import register
from cruijff_kit.sweep import plugin
from cruijff_kit.sweep.composer import Composer

RUNS = [
    ["lr=1e-3"],
    ["lr=2e-3", "lora.rank=4", "seed=3"],
    ["lora.rank=16", "model=llama3_1_8b", "slurm=cluster"],
    ["slurm=cluster", "slurm.setup=[a,b]", "++slurm.additional_parameters.nice=3", "slurm.mem=1G"],
    ["dataset=json", "dataset.path=x.json", "eval=none"],
    ["+torchtune.optimizer.betas=[0.9,0.95]", "lr=1e-5"],
    ["~dataset.arguments.seed", "lr=1e-5"],
    ["dataset.arguments={num_words: 30}", "run_name=a", "experiment.name=b"],
    ["torchtune.optimizer._component_=torch.optim.SGD"],
    ["eval.tasks=[match]", "eval=capitalization"],
]


# Keys of Hydra's own, groups of the user's, groups and their values in either order, what is taken out.
MORE = [
    ["hydra.job.name=x", "lr=1e-3"],
    ["+hydra.job.env_set.A=b"],
    ["hydra.sweeper.max_batch_size=3"],
    ["hydra.launcher.nothing=1"],
    ["hydra/launcher=basic"],
    ["+mine=one", "lr=1e-3"],
    ["mine=two"],
    ["lora.rank=4", "lora=dora"],
    ["lora=dora", "lora.rank=4"],
    ["~lora.rank"],
    ["~lora.rank=8"],
]


@pytest.fixture(scope="module")
def loader() -> ConfigLoader:
    register()
    plugin.register()
    with initialize_config_module("cruijff_kit.conf", version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.mark.parametrize("typed", [[], ["hydra.sweep.dir=out", "hydra.job.config.override_dirname.item_sep=_"]])
def test_the_same_config(loader, typed, tiny):
    own = ["model=hf_llama", f"model.path={tiny}"]
    master = loader.load_configuration("config", [*typed, *own], RunMode.MULTIRUN)
    composer = Composer(loader, master)
    for overrides in RUNS:
        given = [*own, *overrides]
        quick, hydras = composer.compose(given), loader.load_sweep_config(master, given)
        assert OmegaConf.to_yaml(quick) == OmegaConf.to_yaml(hydras)
        assert quick._metadata.flags == hydras._metadata.flags


@pytest.mark.parametrize("wrong", ["lora.rnk=3", "lora.rank=x", "model=nothing", "~lora.rnk"])
def test_the_same_errors(loader, wrong, tiny):
    master = loader.load_configuration("config", ["model=hf_llama", f"model.path={tiny}"], RunMode.MULTIRUN)
    errors = []
    for compose in (Composer(loader, master).compose, lambda o: loader.load_sweep_config(master, o)):
        with pytest.raises(Exception) as raised:
            compose([wrong])
        errors.append((raised.type, str(raised.value)))
    assert errors[0] == errors[1]


def attempt(compose: Callable[[list[str]], DictConfig], overrides: list[str]) -> tuple[type, str]:
    """What composing gives, or what it raises."""
    try:
        return DictConfig, OmegaConf.to_yaml(compose(overrides))
    except Exception as error:
        return type(error), str(error)


@pytest.mark.parametrize("overrides", MORE, ids=" ".join)
def test_the_same_config_or_error(loader, overrides, tiny, tmp_path):
    Path(tmp_path, "mine").mkdir()
    for name in ("one", "two"):
        Path(tmp_path, "mine", f"{name}.yaml").write_text("# @package _global_\nlr: 3e-3\n")
    own = ["model=hf_llama", f"model.path={tiny}", f"hydra.searchpath=[file://{tmp_path}]"]
    master = loader.load_configuration("config", own, RunMode.MULTIRUN)
    hydras = attempt(lambda o: loader.load_sweep_config(master, o), overrides)
    assert attempt(Composer(loader, master).compose, overrides) == hydras
