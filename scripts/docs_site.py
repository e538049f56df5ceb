"""The pages of the docs site that are made from the code and from conf/, so that nothing is written twice.

A hook of mkdocs (mkdocs.yml). Pages of the navigation that are not there are left out of it.
"""

import json
import re
import tokenize
from collections.abc import Callable, Iterator
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import fl_attack
from fl_attack import attack, history, sweep_table
from fl_attack.overrides import conf_folder

ROOT = Path(__file__).parents[1]
GROUPS = ("dataset", "partition", "model", "attack", "strategy", "engine", "experiment")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Leave out what the navigation names and nobody has written."""
    there = {file.relative_to(config.docs_dir).as_posix() for file in Path(config.docs_dir).rglob("*.md")}
    config.nav = _kept(config.nav, there | set(PAGES))
    return config


def _kept(tree: Any, there: set[str]) -> Any:
    """The navigation, of pages that are there."""
    if isinstance(tree, list):
        found = [_kept(one, there) for one in tree]
        return [one for one in found if one]
    if isinstance(tree, dict):
        ((title, below),) = tree.items()
        kept = _kept(below, there)
        return {title: kept} if kept else None
    return tree if tree in there else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    for path, made in PAGES.items():
        files.append(File.generated(config, path, content=made()))
    return files


def keys() -> str:
    """Every key of `conf/` with its default and its comment."""
    parts = ["# Every key\n\nMade from `conf/`: the default of each key, and what its file says of it.\n"]
    parts += ["## Keys that are always there\n", _table_of(conf_folder() / "config.yaml", "")]
    for group in GROUPS:
        parts.append(f"## {group}\n")
        for file in sorted((conf_folder() / group).glob("*.yaml")):
            first = file.read_text(encoding="utf-8").splitlines()[0]
            told = first.removeprefix("# ") if first.startswith("# ") and not first.startswith("# @") else ""
            parts.append(f"### {group}={file.stem}\n\n{_text(told)}\n")
            if group != "experiment":
                parts.append(_table_of(file, f"{group}."))
    return "\n".join(parts)


def _table_of(file: Path, before: str) -> str:
    """The keys of a file as a table."""
    rows = [f"| `{before}{key}` | `{value}` | {_text(comment)} |" for key, value, comment in _keys(file)]
    return "\n".join(["| Key | Default | |", "|---|---|---|", *rows, ""]) if rows else ""


def _keys(file: Path) -> Iterator[tuple[str, str, str]]:
    """Each key of a YAML file with its value and the comment of its line."""
    path: list[str] = []
    for line in file.read_text(encoding="utf-8").splitlines():
        found = re.match(r"^( *)([\w.]+):(?: +(.*?))?(?:\s+# (.*))?$", line)
        if not found:
            continue
        depth, key, value, comment = len(found[1]) // 2, found[2], found[3] or "", found[4] or ""
        path = [*path[:depth], key]
        if path[0] not in ("defaults", "hydra") and value and not value.startswith("#"):
            yield ".".join(path), value.replace("|", "\\|"), comment


def attacks() -> str:
    """Every attack with its function."""
    parts = ["# Every attack\n\nThe table `ATTACKS`, in its order. *Writes* says what malicious clients change.\n"]
    for name, entry in attack.ATTACKS.items():
        uses = ", ".join(f"`attack.{key}`" for key in entry.uses) or "none"
        where = f"{entry.function.__module__}.{entry.function.__qualname__}"
        parts.append(f"## {name}\n\nWrites {entry.writes}. Keys that shape its direction: {uses}.\n\n{_member(where)}")
    return "\n".join(parts)


def rules() -> str:
    """Every aggregation rule and pre-aggregator with its function."""
    from fl_attack.aggregate import PRE, RULES

    parts = ["# Every aggregation rule\n\nThe table `RULES`; `f` is how many clients may be malicious.\n"]
    for name, rule in RULES.items():
        most = ", ".join(f"{rule.max_f(m)} of {m}" for m in (5, 10, 20))
        where = f"{rule.combine.__module__}.{rule.combine.__qualname__}"
        parts.append(f"## {name}\n\nDefined for f up to {most} clients.\n\n{_member(where)}")
    parts.append("# Pre-aggregators\n")
    parts += [
        f"## {name}\n\n{_member(f'{one.apply.__module__}.{one.apply.__qualname__}')}" for name, one in PRE.items()
    ]
    return "\n".join(parts)


def _member(path: str) -> str:
    """The documentation of a function, below its own heading."""
    return f"::: {path}\n    options:\n      heading_level: 3\n"


def columns() -> str:
    """Every column of the tables that runs and sweeps leave, with the comment of its line in the code."""
    of_rounds = _commented(Path(history.__file__), history.COLUMNS)
    of_measures = _commented(Path(fl_attack.detect.__file__), fl_attack.MEASURES)  # type: ignore[attr-defined]
    of_sweeps = _commented(Path(sweep_table.__file__), sweep_table.RESULTS)
    units = {name: label for name, (label, _) in sweep_table.LABELS.items()}
    tables = {
        "rounds.csv, a row for each evaluated round": {
            name: of_rounds.get(name) or of_measures.get(name, "") for name in history.COLUMNS
        },
        "sweep.csv, a row for each cell: its overrides, then": {
            name: of_sweeps.get(name) or of_measures.get(name) or units.get(name, "") for name in sweep_table.RESULTS
        },
    }
    parts = ["# Every column\n"]
    for title, found in tables.items():
        rows = [f"| `{name}` | {_text(told)} |" for name, told in found.items()]
        parts += [f"## {title}\n", "| Column | |", "|---|---|", *rows, ""]
    return "\n".join(parts)


def _commented(file: Path, names: tuple[str, ...]) -> dict[str, str]:
    """The comment on the line of each of these names in a file of Python."""
    found: dict[str, str] = {}
    last = ""
    for token in tokenize.generate_tokens(StringIO(file.read_text(encoding="utf-8")).readline):
        if token.type == tokenize.STRING and token.string.strip("\"'") in names:
            last = token.string.strip("\"'")
        elif token.type == tokenize.COMMENT and last:
            found.setdefault(last, token.string.removeprefix("# "))
        elif token.type in (tokenize.NL, tokenize.NEWLINE):
            last = ""
    return found


def api() -> str:
    """The functions of the public face."""
    members = ("fl_attack.api.run", "fl_attack.api.sweep", "fl_attack.api.load", "fl_attack.result.Result")
    return "# run, sweep, load\n\n" + "\n".join(f"::: {member}\n" for member in members)


def pieces() -> str:
    """What people build their own with: the rest of what the package exports."""
    shown = {"load", "run", "sweep", "Result", "__version__"}
    parts = [
        "# Tables and functions\n\nAll of these are in `fl_attack` itself: `from fl_attack import RULES, select`.\n"
    ]
    for module, names in fl_attack._HOMES.items():
        for name in [name for name in names if name not in shown]:
            part = getattr(fl_attack, name)
            if name.isupper():
                listed = ", ".join(f"`{key}`" for key in part)
                parts.append(f"## {name}\n\n`fl_attack.{module}.{name}`: {listed}.\n")
            elif name == "logistic":
                parts.append("::: fl_attack.models.logistic\n")
            else:
                parts.append(f"::: {part.__module__}.{part.__qualname__}\n")
    return "\n".join(parts)


def _of_root(name: str) -> Callable[[], str]:
    """A page that is a file of the repository, its links turned to those of the site."""

    def read() -> str:
        text = (ROOT / name).read_text(encoding="utf-8")
        return re.sub(r"\]\(docs/", "](", text)

    return read


def _text(comment: str) -> str:
    """A comment as it stands in a cell of a table."""
    return comment.replace("|", "\\|").replace("<", "&lt;").replace("[", "\\[").replace("*", "\\*")


def notebook(file: Path) -> str:
    """A notebook as a page: its cells with what they gave, and a link to itself."""
    parts = [f"*This page is a notebook: [{file.name}]({file.name}).*"]
    for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        parts.append(text.replace(".ipynb)", ".md)") if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        parts += [_shown(output) for output in cell.get("outputs", ())]
    heading = next(i for i, part in enumerate(parts) if part.startswith("# "))
    title, _, rest = parts.pop(heading).partition("\n")
    return "\n\n".join([title, *parts[:heading], rest, *parts[heading:]])


def _shown(output: dict[str, Any]) -> str:
    """An output of a cell: a picture, a table, or text."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        return f"![](data:image/png;base64,{''.join(data['image/png']).strip()})"
    if "text/html" in data:
        return re.sub(r"<style.*?</style>|\n *", "", "".join(data["text/html"]), flags=re.S)
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"


PAGES: dict[str, Callable[[], str]] = {
    "reference/keys.md": keys,
    "reference/attacks.md": attacks,
    "reference/rules.md": rules,
    "reference/columns.md": columns,
    "reference/api.md": api,
    "reference/pieces.md": pieces,
    "contributing.md": _of_root("CONTRIBUTING.md"),
    "changelog.md": _of_root("CHANGELOG.md"),
}
PAGES |= {
    f"notebooks/{file.stem}.md": partial(notebook, file) for file in sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
}
