"""Break the package line by line in a copy, run the tests that reach the line, and list the changes that none notices.

    ./scripts/mutate --sample 60 --seed 1 --path fl_attack/attack --path fl_attack/history.py
    ./scripts/mutate --path fl_attack/models/outputs.py --list            only lists what would be changed
    ./scripts/mutate --sample 20 -- -m "not slow" tests/test_attack.py     with these tests alone

Which test reaches which line is measured first, by running the tests once under coverage (a few minutes for all that
are not slow); it is kept in .mutate/ until the package changes, and of tests that change only those are measured anew.
Then `--sample` different lines are drawn, of each one change: an operator or comparison turned, a condition negated, a
number moved, a name such as min or any replaced by its opposite, an argument, a call, a bound of a slice or a statement
left out. Tests run in processes that are forked when the libraries are loaded, the quickest first, up to the first
failure; what they write goes to copies in a temporary folder. A change that can't be noticed, because the program does
the same, belongs with its reason in scripts/equivalent_mutants.yaml, and does not count. The exit code is 0 where at
least `--least` of the changes were noticed, else 1.
"""

import argparse
import ast
import copy
import gc
import hashlib
import importlib
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import coverage
import hypothesis
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT / ".mutate"
EQUIVALENT = ROOT / "scripts" / "equivalent_mutants.yaml"
COPIED = ("fl_attack", "conf", "tests", "scripts", "pyproject.toml", "README.md", "docs", "mkdocs.yml")
LIBRARIES = (
    "torch",
    "numpy",
    "sklearn.datasets",
    "ray",
    "flwr.serverapp",
    "flwr.clientapp",
    "hydra",
    "matplotlib.pyplot",
)
USUAL = ["-m", "not slow"]
QUIET = ("-q", "-W", "ignore::pytest.PytestAssertRewriteWarning")  # libraries are there before pytest
NOTICED, SLOW, SURVIVED, NOT_REACHED = "noticed", "noticed, by its time", "SURVIVED", "NOT REACHED"
LIKELY = 30  # tests that are run before all the others
WAITS = 20  # times its limit of processor time that a change may last by the clock: it may wait for what never comes

COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
OPPOSITES = [
    ("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("minimum", "maximum"), ("any", "all"), ("floor", "ceil"),
    ("sum", "mean"), ("zeros", "ones"), ("zeros_like", "ones_like"),
]  # fmt: skip
OPPOSITE = dict(OPPOSITES) | {b: a for a, b in OPPOSITES}


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    file: str  # from the root of the repository
    line: int
    statement: int  # the line that its statement begins in
    span: tuple[int, int]  # bytes that are replaced
    replacement: str = field(repr=False)
    before: str
    after: str
    text: str  # its line as it stands

    @property
    def name(self) -> str:
        """A text that no other change of this version of the package has."""
        return f"{self.file}:{self.span}: {self.after}"

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.before}  ->  {self.after}"


def changes(node: ast.AST) -> Iterator[tuple[Any, ast.AST | None]]:
    """The changes of a node: the part that is replaced, and by what (None: the statement is left out)."""

    def made(**parts: Any) -> tuple[Any, ast.AST]:
        other = copy.copy(node)
        for name, part in parts.items():
            setattr(other, name, part)
        return node, other

    match node:
        case ast.Compare(ops=[op, *rest]) if type(op) in COMPARISONS:
            yield made(ops=[COMPARISONS[type(op)](), *rest])
        case ast.BinOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            yield made(op=OPERATORS[type(op)]())
        case ast.BoolOp(op=op, values=values):
            yield made(op=ast.Or() if isinstance(op, ast.And) else ast.And())
            yield node, values[0]
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            yield node, operand
        case ast.IfExp(body=body, orelse=orelse):
            yield made(body=orelse, orelse=body)
        case ast.Constant(value=bool(value)):
            yield node, ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield node, ast.Constant(value + 1)
        case ast.Constant(value=float(value)):
            yield node, ast.Constant(value * 2 if value else 1.0)
        case ast.Constant(value=str(value)) if value.isidentifier():
            yield node, ast.Constant(f"{value}_")
        case ast.Name(id=name) if name in OPPOSITE:
            yield node, ast.Name(OPPOSITE[name])
        case ast.Attribute(attr=name) if name in OPPOSITE:
            yield made(attr=OPPOSITE[name])
        case ast.Slice(lower=lower, upper=upper):
            if lower is not None:
                yield made(lower=None)
            if upper is not None:
                yield made(upper=None)
        case ast.Call(func=func, args=args, keywords=keywords):
            if keywords and not is_strict(keywords[-1]):
                yield made(keywords=keywords[:-1])
            if len(args) + len(keywords) > 1 and args:
                yield made(args=args[:-1])
            if len(args) > 1:
                yield made(args=[args[1], args[0], *args[2:]])
            if isinstance(func, ast.Attribute):
                yield node, func.value  # the call of a method
        case ast.If(test=test) | ast.While(test=test) if not isinstance(test, ast.UnaryOp | ast.Compare):
            yield test, ast.UnaryOp(ast.Not(), test)
        case ast.comprehension(ifs=[first, *_]):
            yield first, ast.Constant(True)
    match node:
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            yield node, None
        case ast.If(orelse=[]):
            yield node, None


def is_strict(node: ast.AST) -> bool:
    """Whether a node is the `strict=True` of a zip: like an assertion, it says what no caller does."""
    return isinstance(node, ast.keyword) and node.arg == "strict"


def visited(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may be changed: no text for people, no types, nothing inside of an f-string."""
    skipped = (ast.JoinedStr, ast.Raise, ast.Import, ast.ImportFrom, ast.Global, ast.Assert)
    for name, part in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "type_params", "bases"):
            continue
        for node in part if isinstance(part, list) else [part]:
            if not isinstance(node, ast.AST) or isinstance(node, skipped) or is_strict(node):
                continue
            match node:
                case ast.Expr(value=ast.Constant()):  # a docstring
                    continue
                case ast.If(test=ast.Name("TYPE_CHECKING") | ast.Compare(left=ast.Name("__name__"))):
                    continue
                case ast.Assign(targets=[ast.Name("__all__")]):
                    continue
                case ast.Subscript(value=ast.Name("Literal" | "Callable")) | ast.Call(func=ast.Name("TypeVar")):
                    continue
            if not isinstance(getattr(node, "ctx", None), ast.Store | ast.Del):
                yield node
            yield from visited(node)


def mutants(file: Path) -> list[Mutant]:
    """All changes of a file, in its order, with those that may not compile or come to the same; see `alters`."""
    source = file.read_bytes()
    starts, lines = [0], source.splitlines(keepends=True)
    for line in lines:
        starts.append(starts[-1] + len(line))
    whole = ast.parse(source)
    begins: dict[int, int] = {}  # of each line: where the innermost statement around it begins
    for node in ast.walk(whole):
        if isinstance(node, ast.stmt):
            begins |= dict.fromkeys(range(node.lineno, (node.end_lineno or node.lineno) + 1), node.lineno)
    found = []
    for place, other in (change for node in visited(whole) for change in changes(node)):
        text = after = "pass"
        if other is not None:
            text = after = ast.unparse(ast.fix_missing_locations(other))
            if isinstance(place, ast.expr) and not isinstance(place, ast.Slice | ast.Constant):
                text = f"({text})"
        start = starts[place.lineno - 1] + place.col_offset
        stop = starts[place.end_lineno - 1] + place.end_col_offset
        name, before = file.relative_to(ROOT).as_posix(), ast.unparse(place)
        parts = before.split("\n")[0], after.split("\n")[0] if other is not None else "(left out)"
        here = lines[place.lineno - 1].decode().strip()
        found.append(Mutant(name, place.lineno, begins[place.lineno], (start, stop), text, *parts, here))
    return found


def alters(mutant: Mutant) -> bool:
    """Whether a change compiles, and is one; to know it the whole file is read twice."""
    source, (start, stop) = (ROOT / mutant.file).read_bytes(), mutant.span
    try:
        changed = ast.parse(source[:start] + mutant.replacement.encode() + source[stop:])
    except SyntaxError:
        return False
    return ast.dump(changed) != ast.dump(ast.parse(source))


def drawn(found: Sequence[Mutant], count: int, seed: int) -> list[Mutant]:
    """A sample of `count` changes, of different lines as long as there are some; all where there are no more."""
    rng = random.Random(seed)
    by_line: dict[tuple[str, int], list[Mutant]] = {}
    for mutant in found:
        by_line.setdefault((mutant.file, mutant.line), []).append(mutant)
    for of_line in by_line.values():
        rng.shuffle(of_line)
    chosen: list[Mutant] = []
    while len(chosen) < count and (lines := [of_line for of_line in by_line.values() if of_line]):
        rng.shuffle(lines)
        for of_line in lines:
            if len(chosen) < count and alters(mutant := of_line.pop()):
                chosen.append(mutant)
    return sorted(chosen, key=lambda mutant: (mutant.file, mutant.line, mutant.span))


class Durations:
    """A plugin of pytest that notes how long each test took, and which failed."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add up set-up, call and tear-down."""
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if report.failed:
            self.failed.add(report.nodeid)

    def of_passed(self) -> dict[str, float]:
        """The seconds of the tests that passed: one that fails anyhow can't tell whether anything has changed."""
        for test in sorted(self.failed):
            print(f"mutate: {test} fails without any change, and is left out", file=sys.stderr, flush=True)
        return {test: seconds for test, seconds in self.seconds.items() if test not in self.failed}


class Reach:
    """Which tests reach which line, and how long each takes."""

    def __init__(self, arguments: Sequence[str], workers: int) -> None:
        state = KEPT / "state.json"
        kept = json.loads(state.read_text()) if state.exists() else {}
        tests = {file.relative_to(ROOT).as_posix(): digest([file]) for file in (ROOT / "tests").glob("test_*.py")}
        others = [*(ROOT / "fl_attack").rglob("*.py"), *(ROOT / "conf").rglob("*.yaml"), *(ROOT / "tests").glob("*.py")]
        package = digest([file for file in others if file.relative_to(ROOT).as_posix() not in tests])
        found = {"package": package, "arguments": list(arguments), "tests": tests}
        seconds: dict[str, float] = kept.get("seconds", {})
        changed = [name for name, of_file in tests.items() if kept.get("tests", {}).get(name) != of_file]
        if kept.get("package") != package or kept.get("arguments") != found["arguments"]:
            shutil.rmtree(KEPT, ignore_errors=True)
            KEPT.mkdir()
            seconds = self.measure([*arguments], workers)
        elif changed:
            seconds = {name: one for name, one in seconds.items() if name.split("::")[0] not in changed}
            seconds |= self.measure(["--cov-append", *arguments, *(changed if arguments == USUAL else [])], workers)
        self.seconds = seconds
        self.data = coverage.CoverageData(str(KEPT / "coverage"))
        self.data.read()
        kept = json.loads(state.read_text()) if state.exists() else {}
        if {name: kept.get(name) for name in found} == found and kept.get("seconds") == seconds:
            self.footprint = dict(kept["footprint"])
        else:
            self.footprint = self.footprints()
            state.write_text(json.dumps(found | {"seconds": seconds, "footprint": self.footprint}))
        self.key = digest([state])

    def measure(self, arguments: Sequence[str], workers: int) -> dict[str, float]:
        """Run tests once, under coverage; how long each took."""
        print("mutate: measuring which test reaches which line", file=sys.stderr, flush=True)
        file, process = KEPT / "seconds.json", os.fork()
        if not process:
            os.environ["COVERAGE_FILE"] = str(KEPT / "coverage")
            plugin = Durations()
            options = [*QUIET, "-n", str(workers), "--dist", "worksteal", "--cov", "fl_attack", "--cov-context", "test"]
            options += ["--cov-report=", f"--basetemp={KEPT / 'tmp'}"]
            code = pytest.main([*options, *arguments], [plugin])
            file.write_text(json.dumps(plugin.of_passed()))
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            raise SystemExit("mutate: the tests could not be run")
        return dict(json.loads(file.read_text()))

    def footprints(self) -> dict[str, int]:
        """How many lines each test reaches: one that reaches few and this one is likely to be about it."""
        found: dict[str, int] = {}
        for file in self.data.measured_files():
            for contexts in self.data.contexts_by_lineno(file).values():
                for context in contexts:
                    test = context.rsplit("|", 1)[0]
                    found[test] = found.get(test, 0) + 1
        return found

    def tests(self, mutant: Mutant) -> list[str]:
        """The tests that run a line, quickest first.

        Of a line that runs on import, those that run any line of its file, and those whose file imports it.
        """
        contexts = self.data.contexts_by_lineno(str(ROOT / mutant.file))
        lines = [mutant.line] if mutant.line in contexts else range(mutant.statement, mutant.line)
        found = {context for line in lines for context in contexts.get(line, []) if context}
        whole: set[str] = set()  # files of which all tests may notice
        if not found and any(line in contexts for line in lines):
            found = {context for of_line in contexts.values() for context in of_line if context}
            whole = importers(mutant.file)
        tests = set()
        for context in found:
            test, phase = context.rsplit("|", 1)
            if phase == "setup":  # what a module's fixture made is looked at by all tests there, not by the first alone
                whole.add(test.split("::")[0])
            tests.add(test)
        tests |= {test for test in self.seconds if test.split("::")[0] in whole}
        return sorted(tests & self.seconds.keys(), key=lambda test: self.seconds[test])

    def in_turn(self, tests: Sequence[str]) -> list[list[str]]:
        """Tests in two parts: the few that are most likely to notice, so that seldom all are collected; the rest."""
        first = sorted(tests, key=lambda test: (self.footprint.get(test, 0), self.seconds[test]))[:LIKELY]
        return [part for part in (first, [test for test in tests if test not in first]) if part]


@lru_cache
def imported_by(test_file: Path) -> set[str]:
    """The names of modules, and of what is taken from them, that a file of tests imports."""
    found = set()
    for node in ast.walk(ast.parse(test_file.read_bytes())):
        if isinstance(node, ast.ImportFrom):
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def importers(file: str) -> set[str]:
    """The files of tests that import a module, given by its file."""
    module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    tests = (ROOT / "tests").glob("test_*.py")
    return {test.relative_to(ROOT).as_posix() for test in tests if module in imported_by(test)}


def digest(files: Sequence[Path]) -> str:
    """A hash of the contents of files."""
    found = hashlib.sha256()
    for file in sorted(files):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


def run_tests(folder: Path, tests: Sequence[str], log: Path, limit: int) -> int:
    """Start the tests in a process of their own, in a copy of the repository; the id of the process."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    try:
        os.setsid()  # so that it can be ended together with what it started
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 1)
        os.dup2(stream, 2)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(folder)
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # to compile all tests takes seconds each time
        sys.dont_write_bytecode = False
        sys.path.insert(0, str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "fl_attack"]:
            del sys.modules[name]
        quiet = [*QUIET, "-x", "-p", "no:cacheprovider", "-p", "no:cov", "--hypothesis-profile=unshrunk"]
        quiet += [f"--basetemp={folder / 'tmp'}"]
        os._exit(int(pytest.main([*quiet, *tests])))
    except BaseException as error:
        print(repr(error), flush=True)
    os._exit(70)


def end(process: int) -> None:
    """End a process and what it started."""
    try:
        os.killpg(process, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def put(file: Path, source: bytes) -> None:
    """Write a file of a copy, without what was compiled of it: another change of the same second would go unseen."""
    for compiled in (file.parent / "__pycache__").glob(f"{file.stem}.*.pyc"):
        compiled.unlink()
    file.write_bytes(source)


class Record:
    """A file of what became of each change, so that a run that was interrupted goes on where it stopped."""

    def __init__(self, tests: str) -> None:
        self.file, self.tests = KEPT / "verdicts.jsonl", tests

    def known(self) -> dict[str, str]:
        """The verdicts that still hold: a change was noticed, or was not by the tests as they are now."""
        rows = [json.loads(row) for row in self.file.read_text().splitlines()] if self.file.exists() else []
        noticed = (NOTICED, SLOW)
        return {
            row["change"]: row["verdict"] for row in rows if row["verdict"] in noticed or row["tests"] == self.tests
        }

    def add(self, change: str, verdict: str) -> None:
        """Note what became of a change."""
        with self.file.open("a") as rows:
            rows.write(json.dumps({"change": change, "verdict": verdict, "tests": self.tests}) + "\n")


def verdicts(
    todo: Sequence[Mutant], reach: Reach, workers: int, limit: float, slack: float, seconds: float
) -> dict[Mutant, str]:
    """The verdict on each change; those whose tests take least come first, and after `seconds` none is begun."""
    until = time.monotonic() + seconds
    record = Record(reach.key)
    known = record.known()
    found = {mutant: known[mutant.name] for mutant in todo if mutant.name in known}
    usual = {mutant: sum(reach.seconds[test] for test in reach.tests(mutant)) for mutant in todo if mutant not in found}
    waiting = sorted(usual, key=lambda mutant: -usual[mutant])
    with tempfile.TemporaryDirectory(prefix="fl-attack-mutate-") as scratch:
        free = [Path(scratch) / f"copy{i}" for i in range(workers)]
        for folder in free:
            folder.mkdir()
            for name in COPIED:
                source, skip = ROOT / name, shutil.ignore_patterns("__pycache__")
                if source.is_dir():
                    shutil.copytree(source, folder / name, ignore=skip)
                else:
                    shutil.copy2(source, folder / name)
        running: dict[int, tuple[Mutant, Path, list[list[str]], float]] = {}

        def start(mutant: Mutant, folder: Path, parts: list[list[str]]) -> None:
            allowed = int(min(limit, 20 + slack * usual[mutant]))
            process = run_tests(folder, parts[0], Path(scratch) / f"{folder.name}.log", allowed)
            running[process] = (mutant, folder, parts[1:], time.monotonic() + WAITS * allowed)

        def settle(mutant: Mutant, verdict: str) -> None:
            found[mutant] = verdict
            record.add(mutant.name, verdict)
            print(f"{len(found)}/{len(todo)} {verdict}: {mutant}", flush=True)

        try:
            while waiting or running:
                if time.monotonic() > until:
                    waiting.clear()
                while waiting and free:
                    mutant = waiting.pop()
                    tests = reach.tests(mutant)
                    if not tests:
                        settle(mutant, NOT_REACHED)
                        continue
                    folder = free.pop()
                    whole, (first, last) = (ROOT / mutant.file).read_bytes(), mutant.span
                    put(folder / mutant.file, whole[:first] + mutant.replacement.encode() + whole[last:])
                    start(mutant, folder, reach.in_turn(tests))
                for process, (mutant, folder, rest, deadline) in list(running.items()):
                    done, status = os.waitpid(process, os.WNOHANG)
                    over = time.monotonic() > deadline
                    if not done and not over:
                        continue
                    if over and not done:
                        end(process)
                    code = os.waitstatus_to_exitcode(status) if done else None
                    del running[process]
                    if code == 0 and rest:
                        start(mutant, folder, rest)
                        continue
                    out_of_time = code in (None, -signal.SIGXCPU, -signal.SIGKILL)
                    settle(mutant, SLOW if out_of_time else NOTICED if code else SURVIVED)
                    put(folder / mutant.file, (ROOT / mutant.file).read_bytes())
                    free.append(folder)
                time.sleep(0.02)
        finally:
            for process in running:
                end(process)
    return found


def known_equivalents() -> list[dict[str, str]]:
    """Changes that do nothing; each has a file, its line, before, after and the reason."""
    return yaml.safe_load(EQUIVALENT.read_text()) or [] if EQUIVALENT.exists() else []


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", action="append", help="a file or folder to change; may be given again (fl_attack)")
    parser.add_argument("--sample", type=int, default=60, help="how many changes (60); 0: all")
    parser.add_argument("--seed", type=int, default=0, help="which ones (0)")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="at a time (processors)")
    parser.add_argument("--limit", type=float, default=300.0, help="processor seconds a change may take (300)")
    parser.add_argument("--slack", type=float, default=4.0, help="times as long as usual a change may take (4)")
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no change is begun (no limit)")
    parser.add_argument("--least", type=float, default=0.9, help="share to be noticed for exit code 0 (0.9)")
    parser.add_argument("--list", action="store_true", help="list the changes and make none")
    parser.add_argument("tests", nargs="*", help="after --: arguments of pytest (-m 'not slow')")
    chosen = parser.parse_args()
    files = []
    for path in map(Path, chosen.path or ["fl_attack"]):
        files += sorted((ROOT / path).rglob("*.py")) if (ROOT / path).is_dir() else [(ROOT / path).resolve()]
    found = [mutant for file in files for mutant in mutants(file)]
    equivalent = {(one["file"], one["line"], one["before"], one["after"]) for one in known_equivalents()}
    todo = drawn(found, chosen.sample or len(found), chosen.seed)
    known = [mutant for mutant in todo if (mutant.file, mutant.text, mutant.before, mutant.after) in equivalent]
    todo = [mutant for mutant in todo if mutant not in known]
    if chosen.list:
        print(*todo, f"{len(todo)} of {len(found)} changes", sep="\n")
        return 0
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("FL_ATTACK_TEST_DATA", str(ROOT.parent / "shared" / "data"))
    os.chdir(ROOT)
    reach = Reach(chosen.tests or USUAL, chosen.workers)
    hypothesis.settings.register_profile(
        "unshrunk", deadline=None, derandomize=True, phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate]
    )
    for name in LIBRARIES:
        importlib.import_module(name)
    gc.freeze()
    began = time.monotonic()
    verdict = verdicts(todo, reach, chosen.workers, chosen.limit, chosen.slack, chosen.seconds)
    todo, left_over = [mutant for mutant in todo if mutant in verdict], len(todo) - len(verdict)
    left = [mutant for mutant in todo if verdict[mutant] in (SURVIVED, NOT_REACHED)]
    print(f"\n{len(todo)} changes in {time.monotonic() - began:.0f} s, {len(known)} more known to do nothing")
    for kind in (NOTICED, SLOW, SURVIVED, NOT_REACHED):
        print(f"{sum(one == kind for one in verdict.values()):5} {kind}")
    if left_over:
        print(f"{left_over:5} not tried yet: the same command goes on with them")
    if left:
        print("\nnot noticed:", *(f"  {mutant}" for mutant in left), sep="\n")
    return int(len(left) > (1 - chosen.least) * len(todo))


if __name__ == "__main__":
    sys.exit(main())
