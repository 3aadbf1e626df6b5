"""Composing quickly gives what Hydra gives."""

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.types import RunMode
from omegaconf import OmegaConf

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


@pytest.fixture(scope="module")
def loader():
    register()
    plugin.register()
    Plugins.instance()
    setup_globals()
    return ConfigLoaderImpl(create_config_search_path("pkg://cruijff_kit.conf"))


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
