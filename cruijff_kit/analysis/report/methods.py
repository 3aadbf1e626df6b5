"""The methods paragraphs of a paper, with the numbers of these runs: read from result.json, config.yaml, torchtune.yaml,
environment.json and, for decoding, the heads of logs.

What is the same in all runs is given once, what varies as a list or a range. What no file says is not said.
"""

import re
from pathlib import Path

from cruijff_kit.analysis.comparisons import VALIDATION, Comparison
from cruijff_kit.analysis.configurations import is_finite
from cruijff_kit.analysis.report.costs import hours_in_words
from cruijff_kit.analysis.report.document import Section, listed, several
from cruijff_kit.analysis.report.load import SEED, Family, Run, Runs
from cruijff_kit.analysis.report.methods_data import data_text, prompt_text
from cruijff_kit.analysis.report.phrases import each, either, setting, worded
from cruijff_kit.analysis.report.wording import (
    SAMPLES,
    detectable_differences,
    selection_in_words,
    test_in_words,
    units_of,
)
from cruijff_kit.records.environment import read_environment
from cruijff_kit.records.result import RunResult

_MODULES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "output_proj": "attention output"}
_PACKAGES = {"python": "Python", "torch": "PyTorch", "hydra-core": "Hydra", "numpy": "NumPy", "scipy": "SciPy"}


def methods(runs: Runs) -> Section:
    """The text as a section of the page."""
    return Section("methods", "Methods, for a paper", methods_text(runs).split("\n\n"))


def methods_text(runs: Runs) -> str:
    """Paragraphs: model and training, data, prompts, evaluation, statistics, software and hardware."""
    parts = (_training, data_text, prompt_text, _evaluation, _statistics, _machines)
    return "\n\n".join(text for part in parts if (text := part(runs)))


def _known(runs: Runs, label: str, *paths: str) -> list[str]:
    """["rank 8 or 16"], or nothing."""
    values = each(runs.all, lambda r: either(r, *paths))
    return [f"{label} {worded(values)}"] if values else []


def _training(runs: Runs) -> str:
    trained = [r for r in runs.all if r.result and r.result.training.get("trainable_parameters")]
    if not trained:
        return ""
    total = each(trained, lambda r: r.result.training.get("total_parameters"))
    name = listed([str(m) for m in each(trained, lambda r: r.result.model)])
    own = [t for t in [_count(total)] if t]
    trainable = _count(each(trained, lambda r: r.result.training["trainable_parameters"]))
    quantized = any(each(trained, lambda r: setting(r, "lora.quantize_base") or None))
    method = "QLoRA (the base model in 4 bits)" if quantized else "LoRA"
    if any(each(trained, lambda r: setting(r, "lora.use_dora") or None)):
        method += " with weight decomposition (DoRA)"
    lora = [*_known(runs, "rank", "lora.rank", "torchtune.model.lora_rank")]
    lora += [*_known(runs, "alpha", "lora.alpha", "torchtune.model.lora_alpha")]
    lora += [*_known(runs, "dropout", "lora.dropout", "torchtune.model.lora_dropout"), *_modules(trained)]
    about = ", ".join([f"{t} parameters with the adapter" for t in own] + _model_hash(trained))
    sentences = [
        f"We fine-tuned {name}{f' ({about})' if about else ''} with {method}: {', '.join(lora)}"
        f"; {trainable} parameters were trained.",
        _initialisation(trained),
        _optimiser(runs),
        _schedule(runs, trained),
        _finished(runs),
        _seeds(trained),
        _changed(trained),
    ]
    return " ".join(s for s in sentences if s)


def _model_hash(runs: list[Run]) -> list[str]:
    hashes = each(runs, lambda r: r.result.model_hash)
    return [f"SHA-256 fingerprint of the base model's files {listed(hashes)}"] if 0 < len(hashes) <= 3 else []


def _initialisation(runs: list[Run]) -> str:
    """How adapters begin (torchtune's modules/peft; PEFT's init_lora_weights=True is the same)."""
    text = (
        "At the start of training the matrices A were drawn from Kaiming's uniform distribution (He et al. 2015, with "
        "a = sqrt(5)) and the matrices B were zero, as in torchtune and PEFT"
    )
    dora = any(each(runs, lambda r: setting(r, "lora.use_dora") or None))
    return text + (", and DoRA's magnitudes were the norms of the base weights' rows." if dora else ".")


def _count(values: list[int]) -> str:
    return listed([f"{v:,}" for v in values], "or") if len(values) <= 3 else f"{values[0]:,} to {values[-1]:,}"


def _finished(runs: Runs) -> str:
    states = runs.states()
    if len(runs.all) == 1:
        return "" if states["done"] else f"The run is {runs.all[0].info.state}."
    others = [f"{number} {state}" for state, number in states.items() if state != "done"]
    return (
        f"Of {len(runs.all)} runs {states['done']} finished ({listed(others)})."
        if others
        else f"All {len(runs.all)} runs finished."
    )


def _modules(runs: list[Run]) -> list[str]:
    def of(run: Run) -> str | None:
        names = either(run, "lora.attn_modules", "torchtune.model.lora_attn_modules")
        if names is None:
            return None
        parts = [_MODULES.get(n, str(n)) for n in names]
        parts += ["MLP"] if either(run, "lora.apply_to_mlp", "torchtune.model.apply_lora_to_mlp") else []
        parts += ["model output"] if either(run, "lora.apply_to_output", "torchtune.model.apply_lora_to_output") else []
        return f"the {listed(parts)} projections"

    values = each(runs, of)
    return [f"on {', or on '.join(values)}"] if values else []


def _optimiser(runs: Runs) -> str:
    name = each(runs.all, lambda r: setting(r, "torchtune.optimizer._component_"))
    about = [
        *_known(runs, "learning rate", "lr", "torchtune.optimizer.lr"),
        *_known(runs, "weight decay", "weight_decay", "torchtune.optimizer.weight_decay"),
    ]
    other = {
        key: each(runs.all, lambda r, key=key: setting(r, f"torchtune.optimizer.{key}"))  # type: ignore[misc]
        for key in ("betas", "eps", "momentum")
    }
    about += [f"{key} {worded(values)}" for key, values in other.items() if values]
    clip = each(runs.all, lambda r: either(r, "clip_grad_norm", "torchtune.clip_grad_norm"))
    about.append(f"gradients clipped to a norm of {worded(clip)}" if clip else "no clipping of gradients")
    if not name:
        return ""
    return f"The optimiser was {worded([str(n).rpartition('.')[2] for n in name])} ({', '.join(about)})."


def _schedule(runs: Runs, trained: list[Run]) -> str:
    shape = each(runs.all, lambda r: setting(r, "lr_scheduler"))
    if not shape:
        component = each(runs.all, lambda r: setting(r, "torchtune.lr_scheduler._component_"))
        shape = [re.sub(r"^get_|_schedule.*$", "", str(c).rpartition(".")[2]) for c in component]
    warmup = each(trained, lambda r: r.result.steps.get("warmup"))
    rows = each(trained, lambda r: r.result.steps.get("rows_per_update") or r.result.effective_batch)
    epochs = each(trained, lambda r: r.result.training.get("epochs") or r.result.settings.get("epochs"))
    updates = each(trained, lambda r: r.result.training.get("steps") or r.result.steps.get("total"))
    parts = [f"the learning rate followed a {worded(shape)} schedule"] if shape else []
    text = parts[0] if parts else ""
    if text and warmup:
        text += " without warm-up" if warmup == [0] else f" after {worded(warmup)} updates of linear warm-up"
    text += f"{'; e' if text else 'E'}ach update took {worded(rows)} rows" if rows else ""
    text += f"{_split(trained)}, over {worded(epochs)} {'epoch' if epochs == [1] else 'epochs'}" if epochs else ""
    text += f" ({worded(updates)} updates)" if updates else ""
    return text[:1].upper() + text[1:] + "." if text else ""


def _split(trained: list[Run]) -> str:
    """How the rows of an update came about, where that is the same in all runs."""
    names = ("batch_size", "gradient_accumulation_steps", "processes")
    values = [each(trained, lambda r, n=n: r.result.changes.get(n, r.result.settings.get(n))) for n in names]  # type: ignore[misc]
    if any(len(v) != 1 for v in values):
        return ""
    size, passes, processes = (v[0] for v in values)
    made_of = [f"batches of {size}", several(passes, "accumulation step")]
    return f" ({', '.join(made_of)}, {processes} {'process' if processes == 1 else 'processes'})"


def _seeds(trained: list[Run]) -> str:
    seeds = each(trained, lambda r: r.result.seeds.get(SEED))
    if not seeds:
        return ""
    words = f"{len(seeds)} random seeds ({listed([*map(str, seeds)])})" if len(seeds) > 1 else f"random seed {seeds[0]}"
    return f"Runs used {words}." if len(trained) > 1 else f"The run used {words}."


def _changed(trained: list[Run]) -> str:
    changed = [r for r in trained if r.result.changes]
    names = sorted({k for r in changed for k in r.result.changes})
    return f"In {several(len(changed), 'run')} retries changed {listed(names)}." if changed else ""


def _evaluation(runs: Runs) -> str:
    cells = [(r, e) for r in runs.with_result for e in r.result.evaluation]
    if not cells:
        return "The runs were not evaluated on tasks." if runs.with_result else ""
    tasks = []
    for task in dict.fromkeys(e.task for _, e in cells):
        own = [e for _, e in cells if e.task == task]
        scorers = listed([*dict.fromkeys(s for e in own for s in e.metrics)])
        known = units_of(r.result for r, e in cells if e.task == task)
        numbers = {c.items for found in runs.analysis.comparisons.values() for c in found if c.task == task}
        of = f" of {worded(sorted(numbers))} {known}" if known != SAMPLES and numbers else ""
        tasks.append(f"{task} ({worded(sorted({e.samples for e in own}))} test samples{of}; scored by {scorers})")
    version = worded(each(runs.with_result, lambda r: r.result.versions.get("inspect-ai")))
    text = f"The adapters were evaluated with inspect-ai{f' {version}' if version else ''} on {listed(tasks)}"
    epochs = sorted({e.epoch for _, e in cells if e.epoch is not None})
    text += (
        f", after {listed([str(e + 1) for e in epochs])} {'epoch' if epochs == [0] else 'epochs'} of training"
        if epochs
        else ""
    )
    text += _decoding(runs)
    before = any(r.result.baseline for r in runs.with_result)
    text += "; the base model was evaluated on the same samples" if before else ""
    missing = sorted({f"{e.task}, {s}" for _, e in cells for s, share in e.coverage.items() if share < 1})
    text += f". Not every answer could be scored by {listed(missing)}; shares scored are reported" if missing else ""
    return text + "."


def _decoding(runs: Runs) -> str:
    """How answers were decoded, as the logs say; where there is none any more, what was asked for."""
    from cruijff_kit.evaluation.eval_logs import read_decoding

    found: dict[str, list[str]] = {}
    seen = set()
    for run in runs.with_result:
        for e in run.result.evaluation:
            if (e.task, e.key) not in seen and Path(e.log).is_file():
                seen.add((e.task, e.key))
                found.setdefault(e.task, []).append(_decoded(read_decoding(e.log)))
    ways = {task: listed(list(dict.fromkeys(said)), "or") for task, said in found.items()}
    if not ways:
        tokens = each(runs.all, lambda r: setting(r, "eval.max_tokens"))
        return f", with at most {worded(tokens)} generated tokens unless the task says otherwise" if tokens else ""
    if len({*ways.values()}) == 1:
        return f"; decoding was {next(iter(ways.values()))}"
    return f"; decoding was {listed([f'{said} in {task}' for task, said in ways.items()])}"


def _decoded(settings: dict[str, float | int | None]) -> str:
    length = f"at most {settings['max_tokens']} tokens" if settings["max_tokens"] else "of any length"
    if not settings["temperature"]:
        return f"greedy ({length})"
    given = [f"{name} {settings[name]:g}" for name in ("top_p", "top_k", "seed") if settings[name] is not None]
    return f"sampling at temperature {settings['temperature']:g} ({', '.join([*given, length])})"


def _statistics(runs: Runs) -> str:
    """How the best was chosen, intervals, tests, corrections, seeds, and what could be found."""
    analysis = runs.analysis
    compared = [c for found in analysis.comparisons.values() for c in found]
    text = [_choice(family) for family in runs.families[:3] if len(family.ranking.configurations) > 1]
    text += [why for why in [runs.analysis.no_best_reason] if why]
    results = [r for c in analysis.configurations for r in c.runs]
    units = units_of(results)
    if not any(r.result.evaluation for r in runs.with_result):
        return " ".join(text)
    text.append(
        f"Intervals are 95%: Wilson's for shares of right answers, studentised bootstrap over {units} for means, BCa "
        "bootstrap for other metrics; of calibration errors by simulation."
    )
    if any(unit := each(runs.with_result, lambda r: r.result.unit_column)):
        text.append(f"Test samples of the same {listed([str(u) for u in unit])} were resampled together.")
    text += _comparisons([c for c in compared if is_finite(c.p_holm)], results)
    if any("crossed" in c.method for c in compared):
        text.append(
            f"Runs that differ only in their seed are one configuration; {units} and seeds are crossed random effects."
        )
    elif analysis.one_seed_notice:
        text.append("Each configuration has one seed, so that these are comparisons of runs.")
    if len(analysis.configurations) > 1:
        text += detectable_differences(runs)
    return " ".join(text)


def _comparisons(tested: list[Comparison], results: list[RunResult]) -> list[str]:
    """What was compared with what, by which tests, and how these are corrected: a sentence, or nothing."""
    words = {"base model": "the base model", "chance": "the best constant answer", "best": "the best configuration"}
    said = []
    for of_validation in (False, True):
        own = [c for c in tested if (c.metric_key == VALIDATION) == of_validation]
        tests = {test_in_words(c.method, units_of(results, of_validation)) for c in own}
        ways = "; ".join(sorted(w for w in tests if not w.startswith("no test")))
        against = listed([w for name, w in words.items() if any(c.against == name for c in own)])
        on = "by their losses on the same validation rows" if of_validation else f"on the same {SAMPLES}"
        said += [f"with {against} {on}{f' ({ways})' if ways else ''}"] if own else []
    if not said:
        return []
    corrected = (
        f"; p is corrected for all {len(tested)} comparisons (Holm 1979), and the intervals of the differences are wide "
        "enough to hold the true differences all at once in 95% of studies like this (Bonferroni)"
    )
    return [f"Configurations were compared {listed(said)}{corrected if len(tested) > 1 else ''}."]


def _choice(family: Family) -> str:
    ranking = family.ranking
    others = len(ranking.best) - 1
    text = f"The best configuration by {family.name} was "
    text += (
        selection_in_words(ranking)
        if ranking.is_optimistic
        else f"chosen out of {len(ranking.configurations)} on the {ranking.split} split"
    )
    return text + (f"; {several(others, 'other')} cannot be distinguished from it." if others else ".")


def _drivers(runs: Runs) -> list[str]:
    """The NVIDIA driver and the CUDA that torch was built for, where runs wrote them down."""
    made_with = [read_environment(run.folder) or {} for run in runs.with_result]
    drivers = sorted({m["nvidia_driver"] for m in made_with if m.get("nvidia_driver")})
    cuda = sorted({b["cuda"] for m in made_with if (b := m.get("torch_build")) and b.get("cuda")})
    found = [f"NVIDIA driver {listed(drivers, 'or')}"] if drivers else []
    return found + ([f"CUDA {listed(cuda, 'or')}"] if cuda else [])


def _machines(runs: Runs) -> str:
    packages: dict[str, list[str]] = {}
    for r in runs.with_result:
        for name, version in r.result.versions.items():
            if version not in packages.setdefault(name, []):
                packages[name].append(version)
    if not runs.with_result:
        return ""
    commits = each(runs.with_result, lambda r: r.result.git_commit)
    software = [f"{_PACKAGES.get(n, n)} {listed(v, 'or')}" for n, v in packages.items()]
    text = f"Software: {listed(software)}" if software else ""
    hashes = each(runs.with_result, lambda r: r.result.code_hash)
    if commits:
        shown = [c[:12] + ("+changes" if c.endswith("+changes") else "") for c in commits[:3]]
        edited = ", changes in provenance/code.patch" if any(c.endswith("+changes") for c in commits) else ""
        text += f" (commit {listed(shown, 'or')}{edited})"
    elif hashes:
        text += f" (hash of the code {listed(hashes[:3], 'or')})"
    devices = each(runs.with_result, lambda r: r.result.machine.get("device"))
    dtype = each(runs.with_result, lambda r: r.result.machine.get("dtype"))
    processes = each(runs.with_result, lambda r: r.result.settings.get("processes"))
    threads = each(
        runs.with_result, lambda r: r.result.machine.get("threads") if r.result.machine.get("device") == "cpu" else None
    )
    processors = each(runs.with_result, lambda r: r.result.machine.get("processor"))
    cpu = f"CPU ({listed(processors, 'or')})" if processors else "CPU"
    hardware = [listed([cpu if d == "cpu" else str(d) for d in devices], "or")] if devices else []
    hardware += _drivers(runs) if devices and devices != ["cpu"] else []
    hardware += [f"{worded(processes)} a run"] if processes and processes != [1] else []
    hardware += [f"{worded(threads)} {'thread' if threads == [1] else 'threads'} a process"] if threads else []
    hardware += [f"precision {worded(dtype)}{' (adapters fp32)' if 'bf16' in dtype else ''}"] if dtype else []
    text += f". Hardware: {', '.join(hardware)}" if hardware else ""
    return f"{text}. {hours_in_words(runs)}"
