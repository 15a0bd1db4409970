"""What a user would pick instead of a model: hassil's own recognizer, with the same templates.

    python tests/score_hassil.py DATA_DIR [DATA_DIR ...] [--registry FILE] [--kind test]

Prints, for each data file, how many calls are recognized and how many are right. Free-text lists
become wildcards, as Home Assistant has them; carriers become optional words around every order. A
command that is not recognized within the time limit counts as not recognized.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

from hassil import Intents, recognize_best
from hassil.recognize import RecognizeResult

from fc_lightning.calls import INCOMPLETE_PREFIX, FunctionCall, calls_equal
from fc_lightning.dataset import Row, expected_call, read_rows
from fc_lightning.functions import Registry, load_registry

TIME_LIMIT_S = 10


def as_intents(registry: Registry) -> Intents:
    """The registry's sentences as Home Assistant's intents, one for each call name."""
    source = registry.source
    rules = dict(source.get("expansion_rules") or {})
    rules["before"], rules["after"] = _around_orders(source.get("carriers") or [])
    return Intents.from_dict(
        {
            "language": source.get("language", "en"),
            "intents": _intents(registry),
            "expansion_rules": {name: _one_of(texts) for name, texts in rules.items()},
            "lists": {name: _list(entry) for name, entry in (source.get("lists") or {}).items()},
        }
    )


def _intents(registry: Registry) -> dict[str, dict[str, list[dict[str, Any]]]]:
    intents: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for spec in registry.functions:
        for group in spec.sentences:
            name = INCOMPLETE_PREFIX * bool(group.get("incomplete")) + spec.name
            orders = [f"[<before>] {_plain(text)} [<after>]" for text in group.get("orders", [])]
            phrases = [_plain(text) for text in group.get("phrases", [])]
            fixed = group.get("arguments") or {}
            data = {
                "sentences": orders + phrases,
                "slots": {n: json.dumps(v) for n, v in fixed.items()},
            }
            intents.setdefault(name, {"data": []})["data"].append(data)
    return intents


def _around_orders(carriers: list[Any]) -> tuple[list[str], list[str]]:
    texts = [c["says"] if isinstance(c, dict) else c for c in carriers]
    halves = [_plain(text).partition("{request}") for text in texts]
    before = [half[0].strip() for half in halves if half[0].strip()]
    after = [half[2].strip() for half in halves if half[2].strip()]
    return before or ["please"], after or ["please"]


def _list(entry: dict[str, Any]) -> dict[str, Any]:
    if entry.get("wildcard") or "invented_names" in entry:
        return {"wildcard": True}
    if "range" in entry:
        return entry
    values = [value if isinstance(value, dict) else {"in": value} for value in entry["values"]]
    return {
        "values": [
            {"in": _plain(v["in"]), "out": json.dumps(v.get("out", v["in"]))} for v in values
        ]
    }


def _one_of(texts: str | list[str]) -> str:
    return _plain(texts) if isinstance(texts, str) else f"({'|'.join(map(_plain, texts))})"


def _plain(text: str) -> str:
    """A template without punctuation, which hassil takes out of what it reads."""
    return re.sub(
        r"""[,?!.:'"](?=\s|$|[\])|])|(?<=[\s(|])['"]|^['"]""", "", text.replace("[,]", "")
    )


def as_call(registry: Registry, result: RecognizeResult) -> FunctionCall:
    """The call that hassil's result means; several values of an array are joined."""
    name = result.intent.name
    spec = registry.spec(name)
    assert spec is not None, name
    arguments: dict[str, Any] = {}
    if name.startswith(INCOMPLETE_PREFIX):
        arguments = dict.fromkeys(spec.required, "")
    for entity in result.entities_list:
        parameter = spec.by_name.get(entity.name)
        if parameter is None:
            continue
        value = _decoded(entity.value)
        if parameter.type == "array":
            items = value if isinstance(value, list) else [value]
            arguments[entity.name] = [*arguments.get(entity.name, []), *items]
        else:
            arguments[entity.name] = value
    return registry.canonical(FunctionCall(name, arguments))


def _decoded(value: Any) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value.strip().lower()


def recognize(intents: Intents, command: str) -> RecognizeResult | None:
    """hassil's best result, or None if there is none within the time limit."""

    def give_up(*_: object) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(TIME_LIMIT_S)
    try:
        return recognize_best(command, intents, language=intents.language)
    except TimeoutError:
        return None
    finally:
        signal.alarm(0)


def score(registry: Registry, intents: Intents, rows: list[Row]) -> Counter[str]:
    """How many rows are recognized, have the right function, and the right call."""
    counts = Counter(rows=len(rows))
    for row in rows:
        result = recognize(intents, row.example.command)
        if result is not None:
            expected, call = expected_call(row, registry), as_call(registry, result)
            counts["recognized"] += 1
            counts["function match"] += expected.name == call.name
            counts["call match"] += calls_equal(expected, call)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--registry", type=Path)
    parser.add_argument("--kind", default="test")
    options = parser.parse_args()
    registry = load_registry(options.registry)
    intents = as_intents(registry)
    for folder in options.folders:
        for file in sorted(folder.glob(f"*{options.kind}*.json")):
            counts = score(registry, intents, read_rows(file))
            shares = (f"{kind} {n} ({n / counts['rows']:.1%})" for kind, n in counts.items())
            print(f"{file.name}: {', '.join(shares)}")


if __name__ == "__main__":
    main()
