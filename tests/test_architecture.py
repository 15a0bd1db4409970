"""The house: who may import whom, as README's map says."""

import ast
import re
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "fc_lightning"
README = PACKAGE.parent / "README.md"


def floors() -> dict[str, int]:
    """Module name -> floor, read from the map in README."""
    found, floor = {}, None
    for line in README.read_text(encoding="utf-8").splitlines():
        if match := re.match(r" floor (\d+)", line):
            floor = int(match[1])
        elif floor is not None and (match := re.match(r"  (\w+)\.py ", line)):
            found[match[1]] = floor
        elif line.startswith("```"):
            floor = None
    return found


def imported_modules(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = [n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module]
    return {name.split(".")[1] for name in names if name.startswith("fc_lightning.")}


def test_the_map_names_every_module():
    modules = {f.stem for f in PACKAGE.glob("*.py")} - {"__init__"}
    assert floors().keys() == modules


def test_modules_import_only_from_floors_below_their_own():
    floor = floors()
    wrong = [
        f"{file.stem} (floor {floor[file.stem]}) imports {name} (floor {floor[name]})"
        for file in PACKAGE.glob("*.py")
        if file.stem != "__init__"
        for name in sorted(imported_modules(file))
        if floor[name] >= floor[file.stem]
    ]
    assert wrong == []


def test_importing_the_package_imports_neither_torch_nor_lightning():
    code = "import sys, fc_lightning; print({'torch', 'lightning', 'numpy'} & sys.modules.keys())"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


def test_every_public_name_can_be_imported():
    import fc_lightning

    assert sorted(fc_lightning.__all__) == sorted(fc_lightning._HOMES)
    for name in fc_lightning.__all__:
        assert getattr(fc_lightning, name).__doc__, name
