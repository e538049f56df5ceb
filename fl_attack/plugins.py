"""Functions of users, by import path: `module.function`, `module:function` or `path/to/file.py:function`."""

import copy
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from fl_attack.errors import InputError, RunError, one_line


def is_path(name: str) -> bool:
    """Whether a name is an import path rather than one of a table."""
    return "." in name or ":" in name


@cache
def load(path: str) -> Callable[..., Any]:
    """The function, or whatever can be called, of an import path, looked for in the current directory too.

    InputError where there is none, or its module can't be imported.
    """
    module, function = _parts(path)
    try:
        found = getattr(_from_file(Path(module)) if module.endswith(".py") else _imported(module), function, None)
    except (Exception, SystemExit) as error:  # whatever a user's module raises as it is imported
        raise InputError(f"{path} can't be imported: {type(error).__name__}: {one_line(error)}") from None
    if not callable(found):
        raise InputError(f"{path}: there is no function {function} in {module}")
    return found  # type: ignore[no-any-return]


def spelled_out(name: str, folder: str) -> str:
    """A name as a process in another folder understands it.

    Parameters
    ----------
    name : str
        A name of a table, or an import path.
    folder : str
        The folder that relative paths are of.

    Returns
    -------
    str
        `/full/path.py:function` where the module is a file in the folder, else `name` as it is.
    """
    if not is_path(name):
        return name
    module, function = _parts(name)
    file = Path(folder, module if module.endswith(".py") else module.replace(".", "/") + ".py")
    return f"{file.resolve()}:{function}" if file.is_file() else name


def place_of(name: str) -> str:
    """The import path of a function with the file and line where it begins, for messages; alone where none is known."""
    code = getattr(inspect.unwrap(load(name)), "__code__", None)
    if code is None:
        return name
    file = Path(code.co_filename)
    shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f"{name.replace(str(file), file.name)} ({shown}:{code.co_firstlineno})"


def unknown_name(key: str, name: str, what: str, known: Iterable[str], wanted: str = "a function") -> str:
    """The message for a name that is in no table and no import path.

    Parameters
    ----------
    key, name : str
        The setting, and its value.
    what : str
        What it should name, such as "an attack".
    known : iterable of str
        The names of the table.
    wanted : str
        What an import path may lead to, such as "a function".

    Returns
    -------
    str
        The message, in one line.
    """
    return f"{key}={name} is not {what}; known: {', '.join(known)}, or the import path of {wanted}"


def check_keywords(name: str, parameters: Sequence[inspect.Parameter], args: Iterable[str]) -> list[str]:
    """Check that a model or an attack takes arguments; gives the names of those that it takes.

    Parameters
    ----------
    name : str
        The model or attack.
    parameters : sequence of inspect.Parameter
        Its parameters beside those that it is always given.
    args : iterable of str
        The names of the arguments that it is given.

    Returns
    -------
    list of str
        Those of `parameters` that can be given by name.

    Raises
    ------
    InputError
        Where one of `args` is none of them, unless it takes `**kwargs`.
    """
    named = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    known = [one.name for one in parameters if one.kind in named]
    unknown = [key for key in args if key not in known]
    if unknown and not any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters):
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise InputError(f"args.{unknown[0]} is not an argument of name={name}; {takes}")
    return known


def call(name: str, *given: Any, **args: Any) -> Any:
    """What a user's function gives.

    Parameters
    ----------
    name : str
        The import path of the function, such as `mine.py:attack`.
    *given
        Arguments of the function by position.
    **args
        Arguments of the function by name; it gets copies, and can change none for the next call.

    Returns
    -------
    object
        The result of the function, which is not checked.

    Raises
    ------
    RunError
        With the name of the function and what it raised, `sys.exit` included.
    """
    try:
        return load(name)(*given, **copy.deepcopy(args))
    except (Exception, SystemExit) as error:
        raised = f"sys.exit({error.code})" if isinstance(error, SystemExit) else f"{type(error).__name__}: {error}"
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)]
        raise RunError(f"{place_of(name)} raised {' '.join(raised.split())} in line {lines[-1]}") from error


def refuse(name: str, gave: str, wanted: str) -> NoReturn:
    """Refuse what the function of an import path gave.

    Parameters
    ----------
    name : str
        The import path.
    gave : str
        The result of the function in words, as in "an array of shape (3, 2)".
    wanted : str
        A sentence that says what is wanted instead.

    Raises
    ------
    RunError
        Always; it names the function, its file and its line.
    """
    raise RunError(f"{place_of(name)} gave {gave}; {wanted}")


def source_digest(name: str) -> str:
    """The SHA-256, in hex, of the file that a user's function is defined in; empty for a name of a table."""
    if not is_path(name):
        return ""
    file = sys.modules[load(name).__module__].__file__
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""


def _parts(path: str) -> tuple[str, str]:
    """The module or file of an import path, and the name in it; InputError where it is no import path."""
    module, _, function = path.rpartition(":" if ":" in path else ".")
    if not module or not function.isidentifier():
        raise InputError(f"{path} is not an import path; use module.function or path/to/file.py:function")
    return module, function


def _imported(module: str) -> Any:
    """The module of this name; a file of the current folder goes before an installed one."""
    file = Path(module.replace(".", "/") + ".py")
    return _from_file(file) if file.is_file() else importlib.import_module(module)


def _from_file(file: Path) -> Any:
    """The module that a file makes, executed once in a process; FileNotFoundError where there is none."""
    full = file.resolve()
    name = f"fl_attack_plugin_{hashlib.sha256(str(full).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, full)
    if spec is None or spec.loader is None or not full.is_file():
        raise FileNotFoundError(f"there is no file {full}")
    imported = importlib.util.module_from_spec(spec)
    sys.modules[name] = imported
    try:
        spec.loader.exec_module(imported)
    except BaseException:
        del sys.modules[name]
        raise
    return imported
