"""Which test provokes which fault: the list of faults, a scanner of the tests' markers, and docs/faults.md.

python tests/faults.py            # is every landed fault tested, and docs/faults.md up to date?
python tests/faults.py --write    # write docs/faults.md anew
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "faults.md"

# code -> what goes wrong, and what the user gets
FAULTS = {
    "Artifact": {
        "A1": "path does not exist (on every rank, without an abort)",
        "A2": "truncated file",
        "A3": "hash of the weights does not match",
        "A4": "a checkpoint or pickle given for an artifact: the export command is named",
        "A5": "schema newer than this version",
        "A6": "torch version never tested with: warning, and the golden vectors are replayed",
        "A7": "a custom operator is missing",
        "A8": "CUDA artifact on a host without CUDA: moved to the CPU",
        "A9": "NaN or overflow on the cast to a smaller dtype",
        "A10": "manifest without units or cutoff",
        "A11": "golden vectors not reproduced",
    },
    "Structure": {
        "S1": "unknown element: symbol and indices",
        "S2": "one atom: its E0, zero force",
        "S3": "no atoms: zero energy",
        "S4": "coincident atoms: the pair is named, no NaN",
        "S5": "distance below the trained minimum: warning or stop",
        "S6": "coordinate that is NaN or infinite",
        "S7": "singular cell",
        "S8": "cell smaller than the cutoff: all images counted",
        "S9": "periodicity off with a dummy cell",
        "S10": "mixed periodicity: no volume, so no stress",
        "S11": "atoms outside the box",
        "S12": "charge or spin that the model does not support: refused, never dropped",
        "S13": "out of memory: an estimate and the largest size that fits",
        "S14": "no edge is ever dropped",
    },
    "LAMMPS input": {
        "L1": "wrong `units`",
        "L2": "wrong number of pair_coeff arguments: the table type -> element is printed",
        "L3": "mass and element disagree",
        "L4": "types mapped to NULL",
        "L5": "no pairs",
        "L6": "exception on one rank",
        "L7": "too few ghost atoms: the cutoff that is needed",
        "L8": "dangerous neighbour-list builds",
    },
    "Training data": {
        "T1": "missing keys: found and expected",
        "T2": "ragged or truncated frame: its number",
        "T3": "values off by a unit's factor (27.2, 23.06): the likely unit",
        "T4": "NaN in a label",
        "T5": "sign or Voigt order of the stress in doubt",
        "T6": "duplicates across splits",
        "T7": "singular fit of the E0s",
    },
    "Training": {
        "R1": "killed while saving",
        "R2": "disk full",
        "R3": "latest checkpoint damaged: the one before is used, and said so",
        "R4": "NaN loss: stop, the batch is named, the last good state is kept",
        "R5": "resumed with a changed configuration: the difference, and a refusal without the flag",
        "R6": "resumed run equals the uninterrupted one, bitwise on a CPU",
        "R7": "SIGTERM saves and exits",
    },
    "Dynamics and command line": {
        "M1": "explosion: stop, last good restart, trigger frame, culprit atoms",
        "M2": "killed in mid-frame: readable to the last whole frame, appending resumes",
        "M3": "output exists: refused without --overwrite",
        "M4": "unknown option or key: the nearest match",
        "M5": "Ctrl-C: a final checkpoint",
        "M6": "missing engine or extra: the line that installs it; everything else works",
    },
    "Large steps": {
        "J1": "SMILES that cannot be parsed: the line, and why",
        "J2": "no conformer can be embedded",
        "J3": "missing parameters of a force field: the atoms are named",
        "J4": "no pairs for k: which there could be",
        "J5": "hash of a data set of pairs does not match",
        "J6": "a jump for other masses, time step, number of steps or constraints",
        "J7": "a jump that is not finite: the atom is named",
        "J8": "constraints that cannot be met: the bond is named",
        "J9": "a student or macro-step that no longer corrects anything: refused, with the largest safe step",
    },
}
# no test is asked for until their part is in place
NOT_LANDED: set[str] = set()
CODES = {code: text for group in FAULTS.values() for code, text in group.items()}


def marked_tests(marker: str, tests: Path = TESTS) -> dict[str, list[str]]:
    """Code -> tests that carry ``@pytest.mark.<marker>(code, ...)``, as ``tests/path.py::name``.

    Read from the source: nothing is imported, and no selection of tests hides one. Decorators of functions and
    classes, `pytestmark` of a module or class and ``pytest.param(..., marks=...)`` are all found.

    Raises:
        ValueError: for a marker whose codes are not literal strings, or that stands where pytest collects no test.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(tests.rglob("test_*.py")):
        name = path.relative_to(tests.parent).as_posix()
        for owner, call in _marks(ast.parse(path.read_text(encoding="utf-8")), marker, []):
            codes = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            if not codes or len(codes) != len(call.args) or not all(isinstance(code, str) for code in codes):
                raise ValueError(f"{name}:{call.lineno}: give the codes of {marker} as literal strings")
            if not all(re.match("[Tt]est", part) for part in owner):
                raise ValueError(f"{name}:{call.lineno}: {marker} stands on {owner[-1]}, which is no test")
            for code in codes:
                test = "::".join([name, *owner])
                if test not in found.setdefault(str(code), []):
                    found[str(code)].append(test)
    return found


def _marks(node: ast.AST, marker: str, owner: list[str]) -> Iterator[tuple[list[str], ast.Call]]:
    """Every call of ``pytest.mark.<marker>`` below `node`, with the class and function that it stands on."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        owner = [*owner, node.name]
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(f"mark.{marker}"):
        yield owner, node
    for child in ast.iter_child_nodes(node):
        yield from _marks(child, marker, owner)


def problems(found: dict[str, list[str]], codes: Iterable[str], not_landed: Iterable[str] = ()) -> list[str]:
    """What is wrong with the markers: codes that are not listed, and listed codes of landed parts without a test."""
    known, waiting = list(codes), set(not_landed)
    unknown = [f"{code} is no listed fault, marked by {', '.join(found[code])}" for code in found if code not in known]
    untested = [f"{code} has no test" for code in known if code not in found and code not in waiting]
    return unknown + untested


def page(found: dict[str, list[str]]) -> str:
    """The text of docs/faults.md."""
    lines = [
        "# Faults and their tests",
        "",
        "Every error names the file or atom, the cause and the fix, exits non-zero and leaves earlier output intact.",
        "Generated from the tests by `python tests/faults.py --write`; the suite fails when this page is stale or a",
        "fault has no test. Parts that are not in place yet have none.",
    ]
    for group, faults in FAULTS.items():
        lines += ["", f"## {group}", "", "| | fault | tests |", "|---|---|---|"]
        for code, text in faults.items():
            tests = "<br>".join(f"`{test}`" for test in found.get(code, ()))
            lines.append(f"| {code} | {text} | {tests or ('not in place yet' if code in NOT_LANDED else '**none**')} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    found = marked_tests("fault")
    if arguments == ["--write"]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(found), encoding="utf-8")
    elif arguments:
        print(__doc__, file=sys.stderr)
        return 2
    wrong = problems(found, CODES, NOT_LANDED)
    if not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != page(found):
        wrong.append("docs/faults.md is stale: python tests/faults.py --write")
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong and not arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
