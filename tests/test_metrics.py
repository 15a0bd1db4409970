"""Hand-made cases, and agreement with a scorer that shares no code with the package."""

import copy
import math
import pickle
import time
from collections import Counter

import pytest
import torch
from naive_scorer import naive_errors, naive_measures, naive_shared, naive_valid, random_pairs

from fc_lightning.calls import FunctionCall, render_call
from fc_lightning.functions import load_registry
from fc_lightning.metrics import (
    ERROR_KINDS,
    CallError,
    CallMetrics,
    compare_calls,
    confusion_figure,
    read_call,
    wilson_interval,
)

REGISTRY = load_registry()
ZONES = ["driver", "front-passenger", "rear-right", "rear-left"]


def call(name, **arguments):
    return FunctionCall(name, arguments)


def errors_of(expected, predicted):
    comparison = compare_calls(REGISTRY, expected, predicted)
    assert comparison.is_match == (not comparison.errors)
    return [(e.kind, e.argument) for e in comparison.errors]


def triples_of(expected, predicted):
    c = compare_calls(REGISTRY, expected, predicted)
    return c.num_shared_triples, c.num_predicted_triples, c.num_expected_triples


# ---------------------------------------------------------------- by hand: equality


@pytest.mark.parametrize(
    ("expected", "predicted", "is_match"),
    [
        ({"temperature": 21}, {"temperature": 21.0}, True),
        ({"temperature": 1}, {"temperature": True}, False),
        ({"temperature": 5}, {"temperature": "5"}, False),
        ({"temperature": 5, "unit": "celsius"}, {"unit": "celsius", "temperature": 5}, True),
        ({"temperature": 5, "unit": "celsius"}, {"temperature": 5}, False),
        ({"temperature": 5}, {"temperature": 5, "unit": "celsius"}, False),
        ({"temperature": 5, "unit": "celsius"}, {"temperature": 5, "unit": " Celsius"}, True),
        ({"temperature": 5, "area": ZONES}, {"temperature": 5, "area": ZONES[::-1]}, True),
        ({"temperature": 5, "area": ["driver"]}, {"temperature": 5, "area": "driver"}, False),
        ({"area": ["driver"]}, {"area": ["driver", "driver"]}, False),
        ({"area": ["driver", "rear-left"]}, {"area": ["driver", "driver"]}, False),
    ],
)
def test_a_match_is_equality_of_calls(expected, predicted, is_match):
    pair = FunctionCall("set_temperature", expected), FunctionCall("set_temperature", predicted)
    assert compare_calls(REGISTRY, *pair).is_match is is_match


# ---------------------------------------------------------------- by hand: the taxonomy


def test_example_errors_are_the_first_that_fits_and_stop_there():
    expected = call("set_fan_speed", speed="low", area=["driver"])
    assert errors_of(expected, None) == [("InvalidOutput", None)]
    assert errors_of(expected, call("set_fan", speed=7)) == [("HallucinatedFunction", None)]
    assert errors_of(expected, call("adjust_fan_speed", speed=7)) == [("InvalidFunction", None)]
    incomplete = call("possibly_incomplete_set_fan_speed", speed="")
    assert errors_of(expected, incomplete) == [("InvalidFunction", None)]
    # Without a required argument nothing can be left out, so this name does not exist.
    no_such_form = call("possibly_incomplete_start_engine")
    assert errors_of(expected, no_such_form) == [("HallucinatedFunction", None)]


@pytest.mark.parametrize(
    ("expected", "predicted", "kinds"),
    [
        ({"speed": "low", "area": ["driver"]}, {"speed": "low"}, ["MissingParameter"]),
        ({"speed": "low"}, {"speed": "low", "area": ["driver"]}, ["HallucinatedParameter"]),
        ({"speed": "low"}, {"speed": "low", "zone": 1}, ["HallucinatedParameter"]),
        ({"speed": "low", "area": ["driver"]}, {"speed": "low", "area": "driver"},
         ["IncorrectParameterTypeArray"]),
        ({"speed": "low"}, {"speed": ["low"]}, ["IncorrectParameterTypeArray"]),
        ({"speed": "low"}, {"speed": "turbo"}, ["HallucinatedParameterValue"]),
        ({"speed": "low"}, {"speed": True}, ["HallucinatedParameterValue"]),
        ({"speed": "low"}, {"speed": ""}, ["HallucinatedParameterValue"]),
        ({"speed": "low"}, {"speed": "high"}, ["IncorrectParameterValue"]),
        ({"speed": "low"}, {}, ["MissingParameter"]),
        ({"area": ["driver"]}, {"area": ["trunk"]},
         ["HallucinatedArrayElement", "MissingArrayElement"]),
        ({"area": ["driver"]}, {"area": ["rear-left"]},
         ["IncorrectArrayElement", "MissingArrayElement"]),
        ({"area": ["driver"]}, {"area": ["driver", "driver"]}, ["IncorrectArrayElement"]),
        ({"area": ZONES}, {"area": ZONES[:2]}, ["MissingArrayElement"] * 2),
        ({"area": ["driver"]}, {"area": []}, ["MissingArrayElement"]),
        ({"area": ["driver"]}, {"area": [["driver"], None, 3]},
         ["HallucinatedArrayElement"] * 3 + ["MissingArrayElement"]),
    ],
)  # fmt: skip
def test_argument_errors(expected, predicted, kinds):
    pair = FunctionCall("set_fan_speed", expected), FunctionCall("set_fan_speed", predicted)
    assert [kind for kind, _ in errors_of(*pair)] == kinds


def test_bounds_and_types_are_judged_by_the_schema():
    expected = call("set_cruise_control", speed=100)
    for value, kind in [
        (150, "IncorrectParameterValue"),
        (151, "HallucinatedParameterValue"),
        (9, "HallucinatedParameterValue"),
        (99.5, "HallucinatedParameterValue"),
        ("100", "HallucinatedParameterValue"),
    ]:
        assert errors_of(expected, call("set_cruise_control", speed=value)) == [(kind, "speed")]


def test_the_empty_string_is_a_value_only_where_an_argument_may_be_left_out():
    incomplete = "possibly_incomplete_set_fan_speed"
    said, left_out = call(incomplete, speed="low"), call(incomplete, speed="")
    assert errors_of(said, left_out) == [("IncorrectParameterValue", "speed")]
    assert errors_of(left_out, said) == [("IncorrectParameterValue", "speed")]
    assert compare_calls(REGISTRY, left_out, left_out).is_valid
    assert not compare_calls(REGISTRY, said, said).is_valid


def test_errors_name_the_argument_and_both_values():
    expected = call("set_fan_speed", speed="low", area=["driver", "rear-left"])
    predicted = call("set_fan_speed", speed="high", area=["driver", "trunk"])
    assert compare_calls(REGISTRY, expected, predicted).errors == (
        CallError("IncorrectParameterValue", "speed", "low", "high"),
        CallError("HallucinatedArrayElement", "area", ["driver", "rear-left"], "trunk"),
        CallError("MissingArrayElement", "area", "rear-left", ["driver", "trunk"]),
    )


def test_a_match_outside_the_schema_is_a_match_and_not_valid():
    comparison = compare_calls(
        REGISTRY, call("set_fan_speed", speed="medium"), call("set_fan_speed", speed="MEDIUM")
    )
    assert (comparison.is_match, comparison.is_valid, comparison.errors) == (True, False, ())


# ---------------------------------------------------------------- by hand: triples


def test_each_array_element_is_its_own_triple():
    expected = call("set_fan_speed", speed="low", area=["driver", "rear-left"])
    assert triples_of(expected, expected) == (3, 3, 3)
    assert triples_of(expected, call("set_fan_speed", speed="high", area=["driver"])) == (1, 2, 3)
    repeated = call("set_fan_speed", speed="low", area=["driver", "driver"])
    assert triples_of(expected, repeated) == (2, 3, 3)


def test_a_wrong_function_makes_all_its_triples_wrong():
    expected = call("set_fan_speed", speed="low", area=["driver"])
    assert triples_of(expected, call("set_wiper_speed", speed="low")) == (0, 1, 2)
    assert triples_of(expected, None) == (0, 0, 2)


# ---------------------------------------------------------------- the metric


def test_measures_of_a_handful_of_calls():
    fan, engine = call("set_fan_speed", speed="low", area=["driver"]), call("start_engine")
    incomplete = call("possibly_incomplete_set_fan_speed", speed="")
    metric = CallMetrics(REGISTRY)
    metric.update(
        [fan, fan, fan, engine, incomplete, incomplete],
        [
            fan,
            call("set_fan_speed", speed="high", area=["driver"]),
            incomplete,
            None,
            incomplete,
            call("set_fan", speed="low"),
        ],
    )
    measured = {name: value.item() for name, value in metric.compute().items()}
    expected = {
        "num_examples": 6,
        "call_match": 2 / 6,
        "function_match": 3 / 6,
        "argument_match": 2 / 3,
        "argument_precision": 4 / 7,
        "argument_recall": 4 / 8,
        "argument_f1": 8 / 15,
        "valid": 4 / 6,
        "complete_call_match": 1 / 4,
        "incomplete_call_match": 1 / 2,
        "incomplete_precision": 1 / 2,
        "incomplete_recall": 1 / 2,
        "incomplete_f1": 1 / 2,
        "call_match/set_fan_speed": 2 / 5,
        "call_match/start_engine": 0.0,
        "errors/InvalidOutput": 1,
        "errors/HallucinatedFunction": 1,
        "errors/InvalidFunction": 1,
        "errors/IncorrectParameterValue": 1,
        "errors/MissingParameter": 0,
    }
    assert {name: measured[name] for name in expected} == pytest.approx(expected)
    assert math.isnan(measured["call_match/lock_doors"])


def test_measures_can_be_taken_over_some_call_names_only():
    metric = CallMetrics(REGISTRY)
    lock, engine = call("lock_doors", lock_state="lock"), call("start_engine")
    metric.update([lock, lock, engine], [lock, engine, engine])
    assert metric.measures(["lock_doors"])["num_examples"] == 2
    assert metric.measures(["lock_doors"])["call_match"] == 0.5
    assert metric.measures(["lock_doors"])["errors/InvalidFunction"] == 1
    assert metric.measures(["no_such_name"])["num_examples"] == 0


def test_the_confusion_matrix_ends_with_unknown_and_unreadable():
    metric = CallMetrics(REGISTRY)
    lock = call("lock_doors", lock_state="lock")
    metric.update([lock] * 4, [lock, call("start_engine"), call("unlock"), None])
    row, others = REGISTRY.call_names.index("lock_doors"), len(REGISTRY.call_names)
    matrix = metric.confusion_matrix()
    assert matrix.shape == (others, others + 2)
    assert matrix.sum() == matrix[row].sum() == 4
    engine = REGISTRY.call_names.index("start_engine")
    assert matrix[row, [row, engine, others, others + 1]].tolist() == [1, 1, 1, 1]


def test_no_examples_give_nan_and_no_crash():
    metric = CallMetrics(REGISTRY)
    metric.update([], [])
    measured = metric.compute()
    assert measured["call_match"].isnan() and measured["incomplete_f1"].isnan()
    assert measured["num_examples"] == 0


def test_an_expected_function_outside_the_registry_is_an_error_that_counts_nothing():
    metric = CallMetrics(REGISTRY)
    with pytest.raises(ValueError, match="'open_roof' is not in the registry"):
        metric.update([call("start_engine"), call("open_roof")], [None, None])
    assert metric.counts.sum() == 0
    with pytest.raises(ValueError, match="zip"):
        metric.update([call("start_engine")], [])


def test_unreadable_text_is_read_as_none():
    assert read_call("I can't do that") is None
    assert read_call('<functioncall> {"name": "start_engine", "arguments": "{') is None
    assert read_call(render_call(call("start_engine"))) == call("start_engine")


def test_the_metric_survives_copying_and_pickling():
    metric = CallMetrics(REGISTRY)
    metric.update([call("start_engine")], [call("start_engine")])
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), metric.clone()):
        assert twin.compute()["call_match"] == 1


# ---------------------------------------------------------------- against the naive scorer


def as_calls(pairs):
    expected = [FunctionCall(*e) for e, _ in pairs]
    return expected, [p and FunctionCall(*p) for _, p in pairs]


def test_single_comparisons_agree_with_the_naive_scorer():
    pairs = random_pairs(seed=1, num_pairs=20_000)
    for pair, expected, predicted in zip(pairs, *as_calls(pairs), strict=True):
        comparison = compare_calls(REGISTRY, expected, predicted)
        kinds = [error.kind for error in comparison.errors]
        assert sorted(kinds) == sorted(naive_errors(*pair)), pair
        assert comparison.is_match == (not kinds), pair
        assert comparison.num_shared_triples == naive_shared(*pair), pair
        assert comparison.is_valid == (pair[1] is not None and naive_valid(*pair[1])), pair


def test_the_random_pairs_hold_every_kind_of_error_and_many_matches():
    kinds = Counter(k for pair in random_pairs(1, 20_000) for k in naive_errors(*pair) or ["none"])
    assert set(kinds) == {*ERROR_KINDS, "none"}
    assert min(kinds.values()) >= 50


def test_all_measures_agree_with_the_naive_scorer():
    pairs = random_pairs(seed=2, num_pairs=4000)
    metric = CallMetrics(REGISTRY)
    metric.update(*as_calls(pairs))
    measured = metric.compute()
    expected = naive_measures(pairs)
    assert {n: measured[n].item() for n in expected} == pytest.approx(expected, rel=1e-6)


def test_rendered_and_parsed_predictions_score_the_same():
    pairs = random_pairs(seed=3, num_pairs=500)
    for expected, predicted in zip(*as_calls(pairs), strict=True):
        text = "no call at all" if predicted is None else render_call(predicted)
        direct = compare_calls(REGISTRY, expected, predicted)
        assert compare_calls(REGISTRY, expected, read_call(text)) == direct


def test_processes_together_equal_one_process_exactly():
    expected, predicted = as_calls(random_pairs(seed=4, num_pairs=300))
    alone, first, second, idle = (CallMetrics(REGISTRY) for _ in range(4))
    alone.update(expected, predicted)
    for i in range(0, 100, 10):
        first.update(expected[i : i + 10], predicted[i : i + 10])
    second.update(expected[100:], predicted[100:])
    # What torchmetrics does with "sum" states that it gathered from all ranks.
    for name in ("counts", "confusion"):
        states = torch.stack([getattr(m, name) for m in (first, second, idle)])
        setattr(first, name, first._reductions[name](states))
    first._computed = None
    for name, value in alone.compute().items():
        torch.testing.assert_close(first.compute()[name], value, rtol=0, atol=0, equal_nan=True)
    assert first.confusion_matrix().equal(alone.confusion_matrix())


def test_five_thousand_comparisons_take_well_under_two_seconds():
    expected, predicted = as_calls(random_pairs(seed=5, num_pairs=5000))
    metric = CallMetrics(REGISTRY)
    start = time.process_time()
    metric.update(expected, predicted)
    assert time.process_time() - start < 2


# ---------------------------------------------------------------- interval and figure


def test_wilson_interval_of_known_values():
    # Newcombe (1998), Statistics in Medicine 17, table I: 81/263, 15/148, 0/20, 1/29.
    for successes, trials, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(20, 20)[1] == 1


def test_the_confusion_figure_shows_only_what_occurs():
    metric = CallMetrics(REGISTRY)
    lock = call("lock_doors", lock_state="lock")
    metric.update([lock] * 3, [lock, lock, None])
    axes = confusion_figure(metric.confusion_matrix(), REGISTRY.call_names).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["lock_doors"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["lock_doors", "unreadable"]
    assert [t.get_text() for t in axes.texts] == ["2", "1"]
    assert confusion_figure(torch.zeros(32, 34), REGISTRY.call_names).axes[0].get_title()
