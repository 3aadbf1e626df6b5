"""The settings that a command changes in the configs of finished runs, to evaluate them again."""

from dataclasses import asdict
from typing import Any

from omegaconf import OmegaConf

from cruijff_kit.config.compose import compose_unresolved
from cruijff_kit.config.explain import explain_errors
from cruijff_kit.config.groups import EvalConfig
from cruijff_kit.config.keys import describe_unknown_key, valid_keys
from cruijff_kit.config.loading import escape_interpolations
from cruijff_kit.config.overrides import parse_overrides
from cruijff_kit.config.run import RunConfig
from cruijff_kit.config.slurm import SlurmConfig
from cruijff_kit.runs.evaluation_request import EvaluationRequest
from cruijff_kit.util.errors import UserError

# What may differ from the run: its training is done.
_CHANGEABLE = ("eval", "slurm", "device", "threads", "dry_run", "force", "agent", "dataset.permission")


class EvaluationOverrides:
    """Overrides of finished runs."""

    def __init__(self, overrides: list[str], config_dir: str | None) -> None:
        """Raises UserError: a key that does not exist, or that cannot change any more."""
        with explain_errors():
            parsed = parse_overrides(overrides)
        valid = valid_keys()
        for o in parsed:
            key = o.key_or_group
            if not {key, key.partition(".")[0]} & {*_CHANGEABLE} and key in valid:
                raise UserError(
                    f"{key} belongs to the finished training; here only {', '.join(_CHANGEABLE)} can differ"
                )
            is_free = key.startswith(("slurm.additional_parameters.", "eval.task_args."))
            if key not in (*valid, *_CHANGEABLE) and not is_free:
                raise UserError(describe_unknown_key(key))
        self.groups = {o.key_or_group: o.input_line for o in parsed if o.key_or_group in ("eval", "slurm")}
        self.values: dict[str, Any] = {o.key_or_group: o.value() for o in parsed if o.key_or_group not in self.groups}
        self.is_dry_run, self.replaces = bool(self.values.get("dry_run")), bool(self.values.get("force"))
        self._composed = compose_unresolved([*self.groups.values()], config_dir) if self.groups else None

    def note_caller(self, config: RunConfig) -> RunConfig:
        """Put into the config who gives the command, and who permitted it."""
        config.agent = self.values.get("agent")
        config.dataset.permission = self.values.get("dataset.permission", config.dataset.permission)
        return config

    def request(self, config: RunConfig) -> EvaluationRequest:
        """Make the request for a run of this config.

        Raises:
            UserError: a value that cannot be.
        """
        groups = {
            name: self._group(name, kind, config) for name, kind in (("eval", EvalConfig), ("slurm", SlurmConfig))
        }
        device, threads = self.values.get("device", config.device), self.values.get("threads", config.threads)
        return EvaluationRequest(groups["eval"], groups["slurm"], device, threads, replaces=self.replaces)

    def _group(self, name: str, kind: type, config: RunConfig) -> dict[str, Any]:
        """Return the group of the run, or the option in the overrides (which may refer to other groups of the run), with
        the values of the overrides.
        """
        with explain_errors():
            tree = OmegaConf.create(escape_interpolations(asdict(config)))
            if name in self.groups:
                tree[name] = self._composed[name]
            group = escape_interpolations(OmegaConf.to_container(tree[name], resolve=True))
            typed = OmegaConf.create({name: OmegaConf.merge(OmegaConf.structured(kind), group)})
            for key, value in self.values.items():
                if key.startswith(f"{name}."):
                    OmegaConf.update(typed, key, value, force_add=True)
            return asdict(OmegaConf.to_object(typed[name]))
