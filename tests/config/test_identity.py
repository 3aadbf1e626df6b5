"""Which settings make two runs different ones: each is listed here, so that a new one must be put into one of the lists."""

import copy
import dataclasses
from collections.abc import Iterator

import pytest

import cruijff_kit
from cruijff_kit.config.identity import config_hash, configuration_hash, unidentifying_keys
from cruijff_kit.config.run import RunConfig

# Changes what is computed: with another value a run is another one.
IDENTITY = """
model.name model.kind model.path model.download model.hub model.hub_exclude model.builder model.checkpoint_files
model.model_type
dataset.name dataset.path dataset.format dataset.split_column dataset.type dataset.generator dataset.arguments
dataset.column_map dataset.prompt dataset.system_prompt dataset.train_split dataset.validation_split
dataset.test_split dataset.train_on_input dataset.train_on_last dataset.max_samples dataset.max_validation_samples
dataset.max_test_samples dataset.sample_seed dataset.unit_column dataset.packed dataset.max_seq_len
lora.rank lora.alpha lora.dropout lora.attn_modules lora.apply_to_mlp lora.apply_to_output lora.use_dora
lora.quantize_base
eval.tasks eval.task_args eval.epochs eval.max_tokens eval.limit eval.batch_size eval.logprobs eval.top_logprobs
eval.baseline
torchtune epochs batch_size gradient_accumulation_steps max_steps_per_epoch lr lr_scheduler num_warmup_steps
weight_decay clip_grad_norm seed shuffle group_by_length run_val_every_n_steps log_every_n_steps epochs_to_save
save_merged custom_metrics gpus device dtype threads compile enable_activation_checkpointing
enable_activation_offloading
""".split()  # noqa: SIM905
# Changes where a run is made, what it is called, what is said of it, or who may see it.
REST = """
model.date model.resources
dataset.allow_leaks dataset.tier dataset.permission dataset.group_columns
eval.keep_samples
slurm experiment models_dir run_name output_dir checkpoint_every_n_steps resume_from_checkpoint trackers objective
multi_lora report dry_run scaffold max_gpu_hours approved force agent
""".split()  # noqa: SIM905
GROUPS = ("model", "dataset", "lora", "eval")


def settings(cls: type = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every setting, those of groups dotted; a group that is no part of a run's identity is one setting."""
    for field in dataclasses.fields(cls):
        if field.name in GROUPS:
            yield from settings(field.type, f"{field.name}.")
        else:
            yield prefix + field.name


@pytest.fixture(scope="module")
def config(tiny) -> RunConfig:
    return cruijff_kit.compose(["model=hf_llama", f"model.path={tiny}"])


def test_each_setting_is_listed_once():
    message = (
        "does it change what a run computes? Put it into IDENTITY; or into REST, with metadata={'identity': False}"
    )
    assert sorted([*IDENTITY, *REST]) == sorted(settings()), message
    assert {*unidentifying_keys(RunConfig)} == {*REST}, message


@pytest.mark.parametrize("key", [*IDENTITY, *(key for key in REST if key != "output_dir")])
def test_the_hash_changes_with_what_is_computed(config, key):
    """Only with that."""
    changed = copy.deepcopy(config)
    group, _, name = key.rpartition(".")
    setattr(getattr(changed, group) if group else changed, name, {"another": 1} if key == "torchtune" else ["another"])
    assert (config_hash(changed) != config_hash(config)) is (key in IDENTITY)
    assert (configuration_hash(changed) != configuration_hash(config)) is (key in IDENTITY and key != "seed")


@pytest.mark.parametrize(
    "overrides",
    [["seed=1234", "model.date=2020-01-01"], ["trackers=[wandb]"], ["resume_from_checkpoint=true"],
     ["slurm=cluster"],
     ["output_dir=/another"]],
)  # fmt: skip
def test_what_is_filled_into_torchtune_follows(config, tiny, overrides):
    """conf/torchtune.yaml repeats settings; what does not count does not count there either."""
    other = cruijff_kit.compose(["model=hf_llama", f"model.path={tiny}", *overrides, "checkpoint_every_n_steps=5"])
    assert other.torchtune != config.torchtune and config_hash(other) == config_hash(config)


def test_the_seed_is_no_part_of_the_configuration(config, tiny):
    other = cruijff_kit.compose(["model=hf_llama", f"model.path={tiny}", "seed=2"])
    assert config_hash(other) != config_hash(config) and configuration_hash(other) == configuration_hash(config)
