"""A second scorer, as naive as possible, written from the text of the format alone.

It shares no code with the package: its own table of functions, its own equality. Calls are
(name, arguments) pairs, None is unreadable text. Below it, calls mutilated at random.
"""

import random
from collections import Counter

ZONES = ["driver", "front-passenger", "rear-right", "rear-left"]
SEATS = ["driver", "front-passenger", "rear_right", "rear_left"]
AREA = ("array", ZONES)
TABLE = {
    "set_temperature": (["temperature"], {
        "temperature": ("number", 1, 80), "area": AREA,
        "unit": ("enum", ["celsius", "fahrenheit"])}),
    "adjust_temperature": (["action"], {
        "action": ("enum", ["increase", "decrease"]), "area": AREA}),
    "set_fan_speed": (["speed"], {"speed": ("enum", ["low", "medium", "high"]), "area": AREA}),
    "adjust_fan_speed": (["speed"], {"speed": ("enum", ["increase", "decrease"]), "area": AREA}),
    "adjust_seat": (["position"], {
        "position": ("enum", ["forward", "backward", "up", "down", "tilt-forward",
                              "tilt-backward"]),
        "seat_type": ("enum", SEATS)}),
    "control_window": (["window_position"], {
        "window_position": ("enum", ["open", "close"]), "window_location": ("enum", SEATS)}),
    "adjust_wiper_speed": (["speed"], {"speed": ("enum", ["increase", "decrease"])}),
    "set_wiper_speed": (["speed"], {"speed": ("enum", ["low", "medium", "high"])}),
    "activate_defroster": ([], {
        "defroster_zone": ("enum", ["front", "rear", "all"]),
        "duration_minutes": ("integer", 1, 30)}),
    "start_engine": ([], {"method": ("enum", ["remote", "keyless", "keyed"])}),
    "lock_doors": (["lock_state"], {"lock_state": ("enum", ["lock", "unlock"])}),
    "play_music": ([], {"track": ("string",), "volume": ("integer", 1, 10)}),
    "toggle_headlights": (["light_state"], {"light_state": ("enum", ["on", "off"])}),
    "set_navigation_destination": (["destination"], {"destination": ("string",)}),
    "control_ambient_lighting": (["color"], {
        "color": ("enum", ["warm", "red", "blue", "dark", "white"]),
        "intensity": ("integer", 1, 10)}),
    "set_cruise_control": (["speed"], {"speed": ("integer", 10, 150)}),
    "check_battery_health": ([], {"include_history": ("boolean",)}),
    "toggle_sport_mode": (["action"], {"action": ("enum", ["activate", "deactivate"])}),
}  # fmt: skip
PREFIX = "possibly_incomplete_"
KNOWN = [*TABLE, *(PREFIX + name for name, (required, _) in TABLE.items() if required)]


def naive_equal(a, b):
    if isinstance(a, bool) or isinstance(b, bool):
        return isinstance(a, bool) and isinstance(b, bool) and a == b
    if isinstance(a, (int, float)) and isinstance(b, (int, float)):
        return a == b
    if isinstance(a, str) and isinstance(b, str):
        return " ".join(a.casefold().split()) == " ".join(b.casefold().split())
    if isinstance(a, list) and isinstance(b, list):
        has_all = all(any(naive_equal(x, y) for y in b) for x in a)
        return has_all and len(a) == len(b) and not naive_repeats(a) and not naive_repeats(b)
    return False


def naive_repeats(values):
    return any(naive_equal(x, y) for i, x in enumerate(values) for y in values[:i])


def naive_scalar_allowed(rule, value):
    kind, *limits = rule
    if kind in ("enum", "array"):
        return isinstance(value, str) and value in limits[0]
    if kind == "string":
        return isinstance(value, str)
    if kind == "boolean":
        return isinstance(value, bool)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    is_whole = is_number and value == int(value)
    return is_number and limits[0] <= value <= limits[1] and (kind == "number" or is_whole)


def naive_valid(name, arguments):
    if name not in KNOWN:
        return False
    is_incomplete = name.startswith(PREFIX)
    required, rules = TABLE[name.removeprefix(PREFIX)]
    left_out = [r for r in required if is_incomplete and arguments.get(r) == ""]
    if any(r not in arguments for r in required) or (is_incomplete and not left_out):
        return False
    for argument, value in arguments.items():
        if argument not in rules:
            return False
        if argument in left_out:
            continue
        if (rules[argument][0] == "array") != isinstance(value, list):
            return False
        elements = value if isinstance(value, list) else [value]
        if naive_repeats(elements):
            return False
        if not all(naive_scalar_allowed(rules[argument], e) for e in elements):
            return False
    return True


def naive_triples(pair):
    return [
        (argument, element)
        for argument, value in (pair[1].items() if pair else ())
        for element in (value if isinstance(value, list) else [value])
    ]


def naive_shared(expected, predicted):
    if predicted is None or expected[0] != predicted[0]:
        return 0
    left, shared = naive_triples(expected), 0
    for argument, value in naive_triples(predicted):
        for triple in left:
            if triple[0] == argument and naive_equal(triple[1], value):
                left.remove(triple)
                shared += 1
                break
    return shared


def naive_errors(expected, predicted):
    if predicted is None:
        return ["InvalidOutput"]
    (name, wanted), (said_name, said) = expected, predicted
    if said_name not in KNOWN:
        return ["HallucinatedFunction"]
    if said_name != name:
        return ["InvalidFunction"]
    required, rules = TABLE[name.removeprefix(PREFIX)]
    kinds = ["HallucinatedParameter" for argument in said if argument not in wanted]
    for argument, value in wanted.items():
        got = said.get(argument)
        if argument not in said:
            kinds.append("MissingParameter")
        elif isinstance(value, list) != isinstance(got, list):
            kinds.append("IncorrectParameterTypeArray")
        elif isinstance(value, list):
            for i, element in enumerate(got):
                repeats = any(naive_equal(element, e) for e in got[:i])
                if repeats or not any(naive_equal(element, e) for e in value):
                    is_allowed = naive_scalar_allowed(rules[argument], element)
                    kinds.append(
                        "IncorrectArrayElement" if is_allowed else "HallucinatedArrayElement"
                    )
            kinds += [
                "MissingArrayElement" for e in value if not any(naive_equal(e, g) for g in got)
            ]
        elif not naive_equal(value, got):
            may_be_left_out = name.startswith(PREFIX) and argument in required and got == ""
            is_allowed = may_be_left_out or naive_scalar_allowed(rules[argument], got)
            kinds.append("IncorrectParameterValue" if is_allowed else "HallucinatedParameterValue")
    return kinds


def naive_measures(pairs):
    n = len(pairs)
    same = [(e, p) for e, p in pairs if p and p[0] == e[0]]
    matches = [
        1 for e, p in same if set(e[1]) == set(p[1]) and all(naive_equal(v, p[1][k])
                                                            for k, v in e[1].items())
    ]  # fmt: skip
    shared = sum(naive_shared(e, p) for e, p in pairs)
    num_predicted = sum(len(naive_triples(p)) for _, p in pairs)
    num_expected = sum(len(naive_triples(e)) for e, _ in pairs)
    marked = [
        (e[0].startswith(PREFIX), p is not None and p[0].startswith(PREFIX)) for e, p in pairs
    ]
    kinds = Counter(kind for e, p in pairs for kind in naive_errors(e, p))
    return {
        "call_match": len(matches) / n,
        "function_match": len(same) / n,
        "argument_match": len(matches) / len(same),
        "argument_precision": shared / num_predicted,
        "argument_recall": shared / num_expected,
        "argument_f1": 2 * shared / (num_predicted + num_expected),
        "valid": sum(p is not None and naive_valid(*p) for _, p in pairs) / n,
        "incomplete_precision": marked.count((True, True)) / sum(p for _, p in marked),
        "incomplete_recall": marked.count((True, True)) / sum(e for e, _ in marked),
        **{f"errors/{kind}": number for kind, number in kinds.items()},
    }


def random_value(rng, rule):
    kind, *limits = rule
    if kind == "array":
        return rng.sample(limits[0], rng.randint(1, len(limits[0])))
    if kind == "enum":
        return rng.choice(limits[0])
    if kind == "string":
        return rng.choice(["Clair de lune", "Don't  stop", "déjà vu", "5"])
    return rng.random() < 0.5 if kind == "boolean" else rng.randint(*limits)


def random_call(rng):
    name = rng.choice(KNOWN)
    required, rules = TABLE[name.removeprefix(PREFIX)]
    arguments = {
        argument: random_value(rng, rule)
        for argument, rule in rules.items()
        if argument in required or rng.random() < 0.6
    }
    if name.startswith(PREFIX):
        arguments[rng.choice(required)] = ""
    return name, arguments


def corrupt_value(rng, value):
    if isinstance(value, list):
        shuffled = rng.sample(value, len(value))
        return rng.choice([
            shuffled, shuffled[1:], [*shuffled, shuffled[0]], [*shuffled, "trunk"], [],
            [*shuffled, rng.choice(ZONES)], [v.upper() for v in value], value[0], [*value, None],
            [*shuffled[1:], 1], [shuffled],
        ])  # fmt: skip
    if isinstance(value, bool):
        return rng.choice([not value, int(value), str(value), str(value).lower()])
    if isinstance(value, int):
        return rng.choice([str(value), float(value), value + 0.5, value + 1, -value, value * 9,
                           value == 1, [value], None, ""])  # fmt: skip
    return rng.choice([value.upper(), f"  {value} ", value + "s", "", "low", "driver", "increase",
                       "rear_left", "rear-left", 1, True, [value], None, {"a": 1}])  # fmt: skip


def corrupt(rng, name, arguments):
    """The same call up to two mutilations later, keys in any order; None is unreadable."""
    said, said_name = dict(arguments), name
    for _ in range(rng.choice([0, 1, 1, 2])):
        what, argument = rng.random(), rng.choice([*arguments, "mood"])
        if what < 0.07:
            return None
        if what < 0.17:
            said_name = rng.choice([*KNOWN, "open_roof", PREFIX + "start_engine", name.upper()])
        elif what < 0.27:
            is_marked = name.startswith(PREFIX)
            said_name = name.removeprefix(PREFIX) if is_marked else PREFIX + name
        elif what < 0.37:
            said[rng.choice(["area", "speed", "mood", "volume"])] = rng.choice([1, "low", []])
        elif what < 0.47:
            said.pop(argument, None)
        elif argument in arguments:
            said[argument] = corrupt_value(rng, arguments[argument])
    return said_name, dict(rng.sample(list(said.items()), len(said)))


def random_pairs(seed, num_pairs):
    rng = random.Random(seed)
    expected = [random_call(rng) for _ in range(num_pairs)]
    return [(e, corrupt(rng, *e)) for e in expected]
