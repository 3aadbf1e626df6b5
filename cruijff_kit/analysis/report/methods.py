"""The methods paragraphs of a paper, with the numbers of the runs from result.json, config.yaml, torchtune.yaml,
environment.json and, for decoding, the headers of logs.

A value that all runs share is given once, other values as a list or a range. Unknown values are omitted.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cruijff_kit.analysis.comparisons import BASE_MODEL, BEST, CHANCE, VALIDATION, Comparison
from cruijff_kit.analysis.configurations import SEED, is_finite
from cruijff_kit.analysis.report.costs import describe_hours
from cruijff_kit.analysis.report.document import Section, format_count, join_words
from cruijff_kit.analysis.report.load import Family, ReportRun, Runs, RunWithResult
from cruijff_kit.analysis.report.methods_data import describe_data, describe_prompts
from cruijff_kit.analysis.report.phrases import distinct_values, format_values, read_first_setting, read_setting
from cruijff_kit.analysis.report.wording import (
    SAMPLES,
    describe_detectable_differences,
    describe_selection,
    describe_test,
    name_units,
)
from cruijff_kit.records.environment import read_environment
from cruijff_kit.records.result import RunResult

_MODULES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "output_proj": "attention output"}
_PACKAGES = {"python": "Python", "torch": "PyTorch", "hydra-core": "Hydra", "numpy": "NumPy", "scipy": "SciPy"}


def build_methods(runs: Runs) -> Section:
    """Build the section: the methods text."""
    return Section("methods", "Methods text for a paper", compose_methods(runs).split("\n\n"))


def compose_methods(runs: Runs) -> str:
    """Compose paragraphs on model and training, data, prompts, evaluation, statistics, and software and hardware."""
    writers = (
        _describe_training,
        describe_data,
        describe_prompts,
        _describe_evaluation,
        _describe_statistics,
        _describe_machines,
    )
    return "\n\n".join(text for write in writers if (text := write(runs)))


def _describe_setting(runs: Runs, name: str, *paths: str) -> list[str]:
    """Return ["rank 8 or 16"], or [] if no run has the setting."""
    values = distinct_values(runs.all_runs, lambda r: read_first_setting(r, *paths))
    return [f"{name} {format_values(values)}"] if values else []


def _describe_training(runs: Runs) -> str:
    trained_runs = [r for r in runs.runs_with_results if r.result.training.get("trainable_parameters")]
    if not trained_runs:
        return ""
    total = distinct_values(trained_runs, lambda r: r.result.training.get("total_parameters"))
    name = join_words([str(m) for m in distinct_values(trained_runs, lambda r: r.result.model)])
    counts = [t for t in [_format_counts(total)] if t]
    trainable = _format_counts(distinct_values(trained_runs, lambda r: r.result.training["trainable_parameters"]))
    quantized = any(distinct_values(trained_runs, lambda r: read_setting(r, "lora.quantize_base") or None))
    method = "QLoRA (the base model in 4 bits)" if quantized else "LoRA"
    if any(distinct_values(trained_runs, lambda r: read_setting(r, "lora.use_dora") or None)):
        method += " with weight decomposition (DoRA)"
    lora = [*_describe_setting(runs, "rank", "lora.rank", "torchtune.model.lora_rank")]
    lora += [*_describe_setting(runs, "alpha", "lora.alpha", "torchtune.model.lora_alpha")]
    lora += [
        *_describe_setting(runs, "dropout", "lora.dropout", "torchtune.model.lora_dropout"),
        *_describe_modules(trained_runs),
    ]
    details = ", ".join([f"{t} parameters with the adapter" for t in counts] + _describe_fingerprint(trained_runs))
    sentences = [
        f"We fine-tuned {name}{f' ({details})' if details else ''} with {method}: {', '.join(lora)}"
        f"; {trainable} parameters were trained.",
        _describe_initialisation(trained_runs),
        _describe_optimiser(runs),
        _describe_schedule(runs, trained_runs),
        _describe_states(runs),
        _describe_seeds(trained_runs),
        _describe_changes(trained_runs),
    ]
    return " ".join(s for s in sentences if s)


def _describe_fingerprint(runs: list[RunWithResult]) -> list[str]:
    hashes = distinct_values(runs, lambda r: r.result.model_hash)
    return [f"SHA-256 fingerprint of the base model's files {join_words(hashes)}"] if 0 < len(hashes) <= 3 else []


def _describe_initialisation(runs: list[RunWithResult]) -> str:
    """Describe the initial adapters (torchtune's modules/peft; PEFT's init_lora_weights=True is the same)."""
    text = (
        "At the start of training, the matrices A were drawn from Kaiming's uniform distribution (He et al. 2015, with "
        "a = sqrt(5)) and the matrices B were zero, as in torchtune and PEFT"
    )
    dora = any(distinct_values(runs, lambda r: read_setting(r, "lora.use_dora") or None))
    return text + (", and DoRA's magnitudes were the norms of the base weights' rows." if dora else ".")


def _format_counts(values: list[int]) -> str:
    return join_words([f"{v:,}" for v in values], "or") if len(values) <= 3 else f"{values[0]:,} to {values[-1]:,}"


def _describe_states(runs: Runs) -> str:
    states = runs.count_states()
    if len(runs.all_runs) == 1:
        return "" if states["done"] else f"The state of the run is: {runs.all_runs[0].info.state}."
    unfinished = [f"{number} {state}" for state, number in states.items() if state != "done"]
    if not unfinished:
        return f"All {len(runs.all_runs)} runs finished."
    return f"Of {len(runs.all_runs)} runs, {states['done']} finished ({join_words(unfinished)})."


def _describe_modules(runs: list[RunWithResult]) -> list[str]:
    def describe(run: ReportRun) -> str | None:
        names = read_first_setting(run, "lora.attn_modules", "torchtune.model.lora_attn_modules")
        if names is None:
            return None
        parts = [_MODULES.get(n, str(n)) for n in names]
        parts += ["MLP"] if read_first_setting(run, "lora.apply_to_mlp", "torchtune.model.apply_lora_to_mlp") else []
        if read_first_setting(run, "lora.apply_to_output", "torchtune.model.apply_lora_to_output"):
            parts.append("model output")
        return f"the {join_words(parts)} projections"

    values = distinct_values(runs, describe)
    return [f"on {', or on '.join(values)}"] if values else []


def _describe_optimiser(runs: Runs) -> str:
    name = distinct_values(runs.all_runs, lambda r: read_setting(r, "torchtune.optimizer._component_"))
    details = [
        *_describe_setting(runs, "learning rate", "lr", "torchtune.optimizer.lr"),
        *_describe_setting(runs, "weight decay", "weight_decay", "torchtune.optimizer.weight_decay"),
    ]
    values_by_setting = {
        key: distinct_values(runs.all_runs, lambda r, key=key: read_setting(r, f"torchtune.optimizer.{key}"))  # type: ignore[misc]
        for key in ("betas", "eps", "momentum")
    }
    details += [f"{key} {format_values(values)}" for key, values in values_by_setting.items() if values]
    clip = distinct_values(runs.all_runs, lambda r: read_first_setting(r, "clip_grad_norm", "torchtune.clip_grad_norm"))
    details.append(f"gradients clipped to a norm of {format_values(clip)}" if clip else "no gradient clipping")
    if not name:
        return ""
    return f"The optimiser was {format_values([str(n).rpartition('.')[2] for n in name])} ({', '.join(details)})."


def _describe_schedule(runs: Runs, trained_runs: list[RunWithResult]) -> str:
    shape = distinct_values(runs.all_runs, lambda r: read_setting(r, "lr_scheduler"))
    if not shape:
        component = distinct_values(runs.all_runs, lambda r: read_setting(r, "torchtune.lr_scheduler._component_"))
        shape = [re.sub(r"^get_|_schedule.*$", "", str(c).rpartition(".")[2]) for c in component]
    warmup = distinct_values(trained_runs, lambda r: r.result.steps.get("warmup"))
    rows = distinct_values(trained_runs, lambda r: r.result.steps.get("rows_per_update") or r.result.effective_batch)
    epochs = distinct_values(trained_runs, lambda r: r.result.training.get("epochs") or r.result.settings.get("epochs"))
    updates = distinct_values(trained_runs, lambda r: r.result.training.get("steps") or r.result.steps.get("total"))
    parts = [f"the learning rate followed a {format_values(shape)} schedule"] if shape else []
    text = parts[0] if parts else ""
    if text and warmup:
        text += " without warm-up" if warmup == [0] else f" after {format_values(warmup)} updates of linear warm-up"
    text += f"{'; e' if text else 'E'}ach update used {format_values(rows)} rows" if rows else ""
    if epochs:
        noun = "epoch" if epochs == [1] else "epochs"
        text += f"{_describe_batch(trained_runs)}, over {format_values(epochs)} {noun}"
    text += f" ({format_values(updates)} updates)" if updates else ""
    return text[:1].upper() + text[1:] + "." if text else ""


def _describe_batch(trained_runs: list[RunWithResult]) -> str:
    """Describe the batches of an update if they are the same in all runs."""

    def read(name: str) -> Callable[[RunWithResult], Any]:
        return lambda r: r.result.changes.get(name, r.result.settings.get(name))

    names = ("batch_size", "gradient_accumulation_steps", "processes")
    values = [distinct_values(trained_runs, read(name)) for name in names]
    if any(len(v) != 1 for v in values):
        return ""
    size, accumulation, processes = (v[0] for v in values)
    parts = [f"batches of {size}", format_count(accumulation, "accumulation step")]
    return f" ({', '.join(parts)}, {processes} {'process' if processes == 1 else 'processes'})"


def _describe_seeds(trained_runs: list[RunWithResult]) -> str:
    seeds = distinct_values(trained_runs, lambda r: r.result.seeds.get(SEED))
    if not seeds:
        return ""
    text = f"random seed {seeds[0]}"
    if len(seeds) > 1:
        text = f"{len(seeds)} random seeds ({join_words([*map(str, seeds)])})"
    return f"The runs used {text}." if len(trained_runs) > 1 else f"The run used {text}."


def _describe_changes(trained_runs: list[RunWithResult]) -> str:
    runs = [r for r in trained_runs if r.result.changes]
    names = sorted({k for r in runs for k in r.result.changes})
    return f"In {format_count(len(runs), 'run')}, retries changed {join_words(names)}." if runs else ""


def _describe_evaluation(runs: Runs) -> str:
    evaluations = [(r, e) for r in runs.runs_with_results for e in r.result.evaluation]
    if not evaluations:
        return "The runs were not evaluated on tasks." if runs.runs_with_results else ""
    tasks = []
    for task in dict.fromkeys(e.task for _, e in evaluations):
        task_evaluations = [e for _, e in evaluations if e.task == task]
        scorers = join_words([*dict.fromkeys(s for e in task_evaluations for s in e.metrics)])
        units = name_units(r.result for r, e in evaluations if e.task == task)
        numbers = {c.items for comparisons in runs.analysis.comparisons.values() for c in comparisons if c.task == task}
        unit_count = f" of {format_values(sorted(numbers))} {units}" if units != SAMPLES and numbers else ""
        sizes = format_values(sorted({e.samples for e in task_evaluations}))
        tasks.append(f"{task} ({sizes} test samples{unit_count}; scored by {scorers})")
    version = format_values(distinct_values(runs.runs_with_results, lambda r: r.result.versions.get("inspect-ai")))
    text = f"The adapters were evaluated with inspect-ai{f' {version}' if version else ''} on {join_words(tasks)}"
    epochs = sorted({e.epoch for _, e in evaluations if e.epoch is not None})
    if epochs:
        noun = "epoch" if epochs == [0] else "epochs"
        text += f", after {join_words([str(e + 1) for e in epochs])} {noun} of training"
    text += _describe_decoding(runs)
    has_baseline = any(r.result.baseline for r in runs.runs_with_results)
    text += "; the base model was evaluated on the same samples" if has_baseline else ""
    incomplete = sorted({f"{e.task}, {s}" for _, e in evaluations for s, share in e.coverage.items() if share < 1})
    if incomplete:
        text += (
            f". Some answers could not be scored ({'; '.join(incomplete)}); the shares of scored answers are reported"
        )
    return text + "."


def _describe_decoding(runs: Runs) -> str:
    """Describe the decoding of answers from the logs; without logs, the configured maximum of tokens."""
    from cruijff_kit.evaluation.eval_logs import read_decoding

    descriptions: dict[str, list[str]] = {}
    keys = set()
    for run in runs.runs_with_results:
        for e in run.result.evaluation:
            if (e.task, e.key) not in keys and Path(e.log).is_file():
                keys.add((e.task, e.key))
                descriptions.setdefault(e.task, []).append(_format_decoding(read_decoding(e.log)))
    decoding = {task: join_words(list(dict.fromkeys(text)), "or") for task, text in descriptions.items()}
    if not decoding:
        tokens = distinct_values(runs.all_runs, lambda r: read_setting(r, "eval.max_tokens"))
        return (
            f", with at most {format_values(tokens)} generated tokens unless the task sets another limit"
            if tokens
            else ""
        )
    if len({*decoding.values()}) == 1:
        return f"; decoding was {next(iter(decoding.values()))}"
    return f"; decoding was {join_words([f'{text} in {task}' for task, text in decoding.items()])}"


def _format_decoding(settings: dict[str, float | int | None]) -> str:
    length = f"at most {settings['max_tokens']} tokens" if settings["max_tokens"] else "of any length"
    if not settings["temperature"]:
        return f"greedy ({length})"
    options = [f"{name} {settings[name]:g}" for name in ("top_p", "top_k", "seed") if settings[name] is not None]
    return f"sampling at temperature {settings['temperature']:g} ({', '.join([*options, length])})"


def _describe_statistics(runs: Runs) -> str:
    """Describe the choice of the best, intervals, tests, corrections, seeds, and detectable differences."""
    analysis = runs.analysis
    comparisons = [c for group in analysis.comparisons.values() for c in group]
    text = [_describe_choice(family) for family in runs.families[:3] if len(family.ranking.configurations) > 1]
    text += [reason for reason in [runs.analysis.no_best_reason] if reason]
    results = [r for c in analysis.configurations for r in c.runs]
    units = name_units(results)
    if not any(r.result.evaluation for r in runs.runs_with_results):
        return " ".join(text)
    text.append(
        f"Intervals are 95%: Wilson intervals for proportions of correct answers, the studentised bootstrap over {units} "
        "for means, the BCa bootstrap for other metrics, and simulation for calibration errors."
    )
    if any(unit := distinct_values(runs.runs_with_results, lambda r: r.result.unit_column)):
        text.append(f"Test samples of the same {join_words([str(u) for u in unit])} were resampled together.")
    text += _describe_comparisons([c for c in comparisons if is_finite(c.p_holm)], results)
    if any("crossed" in c.method for c in comparisons):
        text.append(
            f"Runs that differ only in their seed are one configuration; {units} and seeds are crossed random effects."
        )
    elif analysis.one_seed_notice:
        text.append("Each configuration has one seed, so these are comparisons of single runs.")
    if len(analysis.configurations) > 1:
        text += describe_detectable_differences(runs)
    return " ".join(text)


def _describe_comparisons(comparisons: list[Comparison], results: list[RunResult]) -> list[str]:
    """Describe in a sentence the comparisons, their tests and the correction; [] without comparisons."""
    names = {BASE_MODEL: "the base model", CHANCE: "the best constant answer", BEST: "the best configuration"}
    parts = []
    for is_validation in (False, True):
        group = [c for c in comparisons if (c.metric_key == VALIDATION) == is_validation]
        tests = {describe_test(c.method, name_units(results, is_validation)) for c in group}
        test_names = "; ".join(sorted(w for w in tests if not w.startswith("no test")))
        opponents = join_words([w for name, w in names.items() if any(c.against == name for c in group)])
        basis = "by their losses on the same validation rows" if is_validation else f"on the same {SAMPLES}"
        parts += [f"with {opponents} {basis}{f' ({test_names})' if test_names else ''}"] if group else []
    if not parts:
        return []
    correction = (
        f"; p is corrected for all {len(comparisons)} comparisons (Holm 1979), and the intervals of the differences are "
        "simultaneous: all of them contain the true differences in 95% of studies like this (Bonferroni)"
    )
    return [f"Configurations were compared {join_words(parts)}{correction if len(comparisons) > 1 else ''}."]


def _describe_choice(family: Family) -> str:
    ranking = family.ranking
    num_others = len(ranking.best) - 1
    text = f"The best configuration by {family.name} was "
    if ranking.is_optimistic:
        text += describe_selection(ranking)
    else:
        text += f"chosen from {len(ranking.configurations)} configurations on the {ranking.split} split"
    others = (
        f"; {format_count(num_others, 'other configuration')} cannot be distinguished from it" if num_others else ""
    )
    return f"{text}{others}."


def _describe_drivers(runs: Runs) -> list[str]:
    """Describe the NVIDIA driver, and the CUDA version of the torch build, if runs recorded them."""
    environments = [read_environment(run.folder) or {} for run in runs.runs_with_results]
    drivers = sorted({m["nvidia_driver"] for m in environments if m.get("nvidia_driver")})
    cuda = sorted({b["cuda"] for m in environments if (b := m.get("torch_build")) and b.get("cuda")})
    parts = [f"NVIDIA driver {join_words(drivers, 'or')}"] if drivers else []
    return parts + ([f"CUDA {join_words(cuda, 'or')}"] if cuda else [])


def _describe_machines(runs: Runs) -> str:
    packages: dict[str, list[str]] = {}
    for r in runs.runs_with_results:
        for name, version in r.result.versions.items():
            if version not in packages.setdefault(name, []):
                packages[name].append(version)
    if not runs.runs_with_results:
        return ""
    commits = distinct_values(runs.runs_with_results, lambda r: r.result.git_commit)
    software = [f"{_PACKAGES.get(n, n)} {join_words(v, 'or')}" for n, v in packages.items()]
    text = f"Software: {join_words(software)}" if software else ""
    hashes = distinct_values(runs.runs_with_results, lambda r: r.result.code_hash)
    if commits:
        short_commits = [c[:12] + ("+changes" if c.endswith("+changes") else "") for c in commits[:3]]
        patch_note = ", changes in provenance/code.patch" if any(c.endswith("+changes") for c in commits) else ""
        text += f" (commit {join_words(short_commits, 'or')}{patch_note})"
    elif hashes:
        text += f" (hash of the code {join_words(hashes[:3], 'or')})"
    devices = distinct_values(runs.runs_with_results, lambda r: r.result.machine.get("device"))
    dtype = distinct_values(runs.runs_with_results, lambda r: r.result.machine.get("dtype"))
    processes = distinct_values(runs.runs_with_results, lambda r: r.result.settings.get("processes"))
    threads = distinct_values(
        runs.runs_with_results,
        lambda r: r.result.machine.get("threads") if r.result.machine.get("device") == "cpu" else None,
    )
    processors = distinct_values(runs.runs_with_results, lambda r: r.result.machine.get("processor"))
    cpu = f"CPU ({join_words(processors, 'or')})" if processors else "CPU"
    hardware = [join_words([cpu if d == "cpu" else str(d) for d in devices], "or")] if devices else []
    hardware += _describe_drivers(runs) if devices and devices != ["cpu"] else []
    hardware += [f"{format_values(processes)} processes per run"] if processes and processes != [1] else []
    hardware += [f"{format_values(threads)} {'thread' if threads == [1] else 'threads'} per process"] if threads else []
    hardware += [f"precision {format_values(dtype)}{' (adapters fp32)' if 'bf16' in dtype else ''}"] if dtype else []
    text += f". Hardware: {', '.join(hardware)}" if hardware else ""
    return f"{text}. {describe_hours(runs)}"
