"""What a sweep varies becomes runs: grids, pairs, listed runs, and the shell's last word."""

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from cruijff_kit.config.loading import register
from cruijff_kit.config.overrides import parse_override
from cruijff_kit.sweep import plugin
from cruijff_kit.sweep.expand import as_override, as_params, expand
from cruijff_kit.util.errors import UserError


def runs(params=None, typed=(), paired=None, listed=None) -> list[list[str]]:
    swept = [parse_override(o) for o in as_params(params or {})]
    return expand(swept, [parse_override(o) for o in typed], paired, listed)


def test_grid():
    assert runs({"a": "1,2"}, ["b=x,y", "c=3"]) == [
        ["a=1", "b=x", "c=3"], ["a=1", "b=y", "c=3"], ["a=2", "b=x", "c=3"], ["a=2", "b=y", "c=3"],
    ]  # fmt: skip
    assert runs() == [[]]


def test_the_shell_has_the_last_word():
    assert runs({"a": "1,2", "b": "3,4"}, ["b=5"]) == [["a=1", "b=5"], ["a=2", "b=5"]]
    assert runs({"a": "1,2"}, ["a=7,8,9"]) == [["a=7"], ["a=8"], ["a=9"]]
    listed = [{"a": 1, "b": 2}, {"a": 1, "b": 3}, {"c": 4}]
    assert runs({}, ["b=9"], listed=listed) == [["a=1", "b=9"], ["c=4", "b=9"]], "the first two are one run now"


def test_pairs_go_side_by_side():
    assert runs({"a": [1, 2], "b": "3,4"}, ["s=1,2"], ["a", "b"]) == [
        ["a=1", "b=3", "s=1"], ["a=1", "b=3", "s=2"], ["a=2", "b=4", "s=1"], ["a=2", "b=4", "s=2"],
    ]  # fmt: skip
    assert len(runs({}, ["a=1,2", "b=3,4", "c=5,6,7", "d=8,9,0"], [["a", "b"], ["c", "d"]])) == 6
    assert runs({}, ["a=1,2", "b=3"], ["a", "b"]) == [["a=1", "b=3"], ["a=2", "b=3"]], "one value goes with all"


def test_text_keeps_its_quotes():
    assert runs({"k": ["{x} ->", "a,b"]}, ['p="1 > 0","x"']) == [
        ['k="{x} ->"', 'p="1 > 0"'], ['k="{x} ->"', 'p="x"'], ['k="a,b"', 'p="1 > 0"'], ['k="a,b"', 'p="x"'],
    ]  # fmt: skip

    assert runs({}, ['k=choice("{x} ->",b)']) == [['k="{x} ->"'], ["k=b"]]


def test_listed_runs():
    listed = [{"a": 1}, ["a=2", "+t.x=[0.9,1]"]]
    assert runs({"s": "1,2"}, [], None, listed) == [
        ["a=1", "s=1"], ["a=1", "s=2"], ["a=2", "+t.x=[0.9,1]", "s=1"], ["a=2", "+t.x=[0.9,1]", "s=2"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (({"a": "1,2", "b": "1,2,3"}, [], ["a", "b"]), "a has 2 values, b has 3 values"),
        (({"rank": "1,2"}, [], ["rang"]), "rang has no values in this sweep; did you mean rank?"),
        (({"a": "1,2", "b": "1,2"}, [], [["a", "b"], ["b"]]), "b is listed twice"),
        (({}, [], "a"), "is a list of keys"),
        (({"a": "1,2"}, [], None, [{"a": 3}]), "a is in hydra.sweeper.params and in hydra.sweeper.runs"),
        (({}, [], None, [["a=1,2"]]), "run 1 of hydra.sweeper.runs sweeps itself (a=1,2)"),
        (({}, [], None, [{"a": 1}, "b"]), "run 2 of hydra.sweeper.runs is 'b'"),
        (({}, [], None, {"a": 1}), "is a list of runs"),
        (({"a": "interval(0,1)"}, []), "a: interval() has no list of values; give some, a=1,2"),
        (({"a": []}, []), "a is an empty list"),
        (({}, ["experiment=a,b"]), "an experiment has its own sweep"),
    ],
)
def test_refused(arguments, says):
    with pytest.raises(UserError) as error:
        runs(*arguments)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "value",
    ["plain", "a, b = c: {input}", 'say "hi" \\ \'there\'', "two\nlines\n", "true", "null", "1e-3", "[1,2]", "ünï", "",
     3, 1e-05, True, None, [1, "a,b"], {"x": [1, "y z"]}],
)  # fmt: skip
def test_values_arrive_as_they_are(value):
    register()
    plugin.register()
    with initialize_config_module("cruijff_kit.conf", version_base="1.3"):
        cfg = compose("config", overrides=[as_override("++dataset.arguments.given", value)])
    found = cfg.dataset.arguments.given
    found = OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
    assert found == value and type(found) is type(value)
