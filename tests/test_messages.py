"""What the program says: what has no effect, what was meant, how far it is; never in a library's words."""

import csv
import errno
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fl_attack import __main__, __version__, experiment, multirun, progress, results, waiting
from fl_attack.config import compose, without_effect
from fl_attack.data import cache
from fl_attack.errors import InputError, Interrupted, RunError, message_or_type, one_line

Small = Callable[..., list[str]]
Command = Callable[..., tuple[int, str, str]]


def short(small_data: Small, out: Path, *more: str) -> list[str]:
    return [*small_data(2), "engine=batched", "rounds=6", "batch_size=full", f"out={out}", *more]


ONE_LINE = {
    "--rounds 50": "--rounds is not an option; settings are given as rounds=value",
    "-m seed=range(0)": "the sweep has no cell",
    "attack=null": "attack=null is not allowed; choose one by its name, as in attack=none",
    "--cfg job -m": "--cfg shows the settings of one run; leave out -m",
    "attack.buget=0.1": "attack.buget is not a known key; did you mean attack.budget?",
    "-m attack.buget=0.1,0.2": "attack.buget is not a known key; did you mean attack.budget?",
    "atack=greedy": "atack is not a known key; did you mean attack?",
    "partition.alpha=1": "partition.alpha is not a known key here: it needs partition=dirichlet",
    "engine.memory_gb=1": "engine.memory_gb is not a known key here: it needs engine=batched",
    "attack=gredy": "; did you mean greedy?",
    "attack.goal=targetted": "must be 'untargeted' or 'targeted'; did you mean targeted?",
    "dataset.classes=3": "dataset.classes=3 is not allowed: it must be a list, as in [0,1]",
    "engine=batched engine.device=tpu": "engine.device=tpu is not allowed: it must be cpu, cuda, or cuda: and a number",
    "out=": "out= is not allowed: it must be a text that is not empty",
    "engine=batched engine.memory_gb=1e300": "engine.memory_gb=1e+300 is not allowed: it must be at most 1000000",
    "attack.budget=abc": "attack.budget=abc is not allowed: it must be a number",
    "attack.name=gredy": "; did you mean greedy?",
    "strategy.name=medan": "; did you mean median?",
    "attack.name=nowhere.py:f": "attack.name=nowhere.py:f can't be imported",
    "dataset=npz dataset.path=FILE": "is not an .npz file",
}


@pytest.mark.parametrize("given", ONE_LINE)
def test_slips_are_told_in_our_words(command: Command, tmp_path: Path, given: str) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    out = [] if "out=" in given else [f"out={tmp_path}/o"]
    code, printed, stderr = command(*given.replace("FILE", f"{tmp_path}/text.npz").split(), *out)
    assert (code, printed, stderr.count("\n")) == (2, "", 1)
    assert ONE_LINE[given] in stderr
    assert not (tmp_path / "o").exists()


def test_the_version_is_ours(command: Command) -> None:
    assert command("--version") == (0, f"fl-attack {__version__}\n", "")


@pytest.mark.slow
def test_closed_streams_do_no_harm(small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    run = " ".join([sys.executable, "-m", "fl_attack", *short(small_data, tmp_path / "o")])
    done = subprocess.run(f"{run} 2>&-", shell=True, stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0
    assert "final accuracy" in done.stdout
    assert subprocess.run(f"{run} overwrite=true >&- 2>&-", shell=True).returncode == 0
    assert subprocess.run(f"{run} 2>&-", shell=True, stdout=subprocess.PIPE).returncode == 2


@pytest.mark.parametrize(
    "given",
    [
        "attack.start=500",
        "attack.stop=500",
        "attack=sign_flip +attack.scope=per_client",
        "attack.knowledge_fraction=0.3",
        "early_stop.share=0.2",
        "eval_every=20",
        "figures=[[matrix]]",
        "launcher=local",
        "detectability=true",
        "dataset.root=elsewhere",
    ],
)
def test_what_has_no_effect_is_noted(command: Command, small_data: Small, tmp_path: Path, given: str) -> None:
    code, _, stderr = command(*short(small_data, tmp_path / "o"), *given.split())
    if "attack.scope" in given:  # no key of this choice
        assert code == 2 and "attack.scope is not a known key" in stderr
        return
    assert code == 0
    (line,) = [line for line in stderr.splitlines() if line.startswith("note: ")]
    assert f"{given.split()[-1].split('=')[0]}" in line and "has no effect: " in line


def test_what_has_an_effect_is_not_noted(command: Command, small_data: Small, tmp_path: Path) -> None:
    code, _, stderr = command("-m", *short(small_data, tmp_path / "o", "detectability=true", "attack.start=3,500"))
    assert code == 0
    assert "note: " not in stderr


def test_cells_that_diverge_have_no_results_and_are_counted(
    command: Command, small_data: Small, tmp_path: Path
) -> None:
    run = short(small_data, tmp_path / "o")
    code, printed, _ = command("-m", *run, "lr=0.1,1e308")
    assert code == 0
    assert printed.endswith("o; 1 of 2 cells broke off: see the column error\n")
    with (tmp_path / "o" / "sweep.csv").open() as lines:
        fine, broken = list(csv.DictReader(lines))
    assert fine["final_accuracy"] != "" and fine["error"] == ""
    for column in ("final_accuracy", "minimum_accuracy", "early_stop_accuracy", "final_f1", "final_loss", "drop"):
        assert broken[column] == ""
    assert "diverged" in broken["error"]
    code, _, stderr = command("-m", *run, "lr=1e307,1e308", "overwrite=true")
    assert code == 1
    assert "all 2 cells broke off, the first because the run diverged" in stderr.splitlines()[-1]
    assert (tmp_path / "o" / "sweep.csv").exists()


@pytest.mark.parametrize("memory", ["1e6", "1e-9"])
def test_rounds_are_counted_to_the_last_whatever_fits_in_memory(
    command: Command, small_data: Small, tmp_path: Path, memory: str
) -> None:
    code, _, stderr = command(*short(small_data, tmp_path / "o", f"engine.memory_gb={memory}"))
    assert code == 0
    lines = [line for line in stderr.splitlines() if line.startswith("batched: round")]
    assert lines[-1] == "batched: round 6 of 6"
    assert len(lines) == len(set(lines)) == 6


def test_the_bar_of_a_sweep_shows_no_noise(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with multirun.Progress(160) as progress:
        for _ in range(986):
            progress.rounds(125, 1)
        progress.bar.refresh()
        assert "7.888" not in (stderr := capsys.readouterr().err)
        assert "7.9/160" in stderr
        progress.add(100)
    assert "of 160 cells" not in capsys.readouterr().err  # the lines of a log are for where there is no bar


def test_a_full_disk_is_no_fault_of_the_input(
    command: Command, small_data: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        cache.write_whole(tmp_path / "file", lambda stream: None)
    monkeypatch.undo()
    run = short(small_data, tmp_path / "o")
    monkeypatch.setattr(experiment.results, "write_rounds", full)
    code, _, stderr = command(*run)
    assert code == 1
    assert "No space left" in stderr.splitlines()[-1]


def test_who_waits_on_a_terminal_sees_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with waiting.waiting("starting"):
        pass
    with waiting.waiting("drawing", on_terminals_only=True):
        pass
    assert capsys.readouterr().err == "starting\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(waiting, "SHOWN_EVERY", 0.01)
    with waiting.waiting("starting"):
        time.sleep(0.1)
    stderr = capsys.readouterr().err
    assert stderr.startswith("starting\rstarting 0 s") and stderr.endswith("\rstarting: 0 s\n")


@pytest.mark.parametrize("given", ["scope=per_client", "rounding=carry", "refresh=epoch", "memory=persist"])
def test_how_labels_are_flipped_has_an_effect_where_labels_are_flipped(given: str) -> None:
    assert without_effect(compose(f"attack.{given}", "out=unused"), sweep=False) == []
    (note,) = without_effect(compose("attack=sign_flip", f"++attack.{given}", "out=unused"), sweep=False)
    assert f"attack.{given} has no effect: " in note


class Bar:
    """A stand-in for the bar of tqdm, shown or not."""

    def __init__(self, disable: bool, **given: Any) -> None:
        self.disable, self.given, self.closed = disable, given, False
        self.n, self.initial, self.total, self.notes = 0.0, 0.0, given["total"], []

    def update(self, more: float) -> None:
        self.n += more

    def set_postfix_str(self, note: str, refresh: bool) -> None:
        self.notes.append((note, refresh))

    def close(self) -> None:
        self.closed = True


def progress_with(monkeypatch: pytest.MonkeyPatch, shown: bool, *given: Any) -> Any:
    monkeypatch.setattr(progress, "_bar", lambda **options: Bar(not shown, **options))
    return progress.Progress(*given)


def test_a_log_has_a_line_for_each_tenth_and_no_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress_with(monkeypatch, False, 20) as counted:
        for _ in range(4):
            counted.rounds(4, 1.0)  # a cell of four rounds
        assert capsys.readouterr().err == ""
        counted.add(1)
        counted.add(0.5)
        counted.skip(4.5)
        counted.round(4, 0, None)  # the start is no round
        counted.round(4, 3, None)
        assert counted.done == 7.25 and counted.bar.n == pytest.approx(7.2) and counted.bar.initial == 0
        counted.extend(20)
        assert counted.bar.total == counted.total == 40
        counted.add(32.75)
    assert capsys.readouterr().err.splitlines() == [
        "sweep: 10 % of 20 cells",
        "sweep: 30 % of 20 cells",
        "sweep: 100 % of 40 cells",
    ]
    assert counted.bar.closed and counted.bar.given == {"total": 20, "unit": "cell", "desc": "sweep"}


def test_a_run_tells_its_rounds_with_the_accuracy_last_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = progress_with(monkeypatch, False, 20, "batched", "round")
    for round_ in range(1, 6):
        counted(round_, {"test_accuracy": 0.5 + round_ / 1000} if round_ % 2 else None)
    assert capsys.readouterr().err == "batched: round 2 of 20\nbatched: round 4 of 20\n"
    counted(6, {"test_accuracy": 0.51236})
    assert capsys.readouterr().err == "batched: round 6 of 20  accuracy 0.5124\n"
    assert counted.bar.notes[0] == ("accuracy 0.5010", False) and len(counted.bar.notes) == 4


def test_a_bar_leaves_what_was_done_before_out_of_its_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counted = progress_with(monkeypatch, True, 10)
    counted.skip(4)
    counted.add(1)
    assert (counted.bar.n, counted.bar.initial) == (5, 4) and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("shell", "widgets", "notebook"),
    [(None, True, False), ({"IPKernelApp": 1}, True, True), ({"IPKernelApp": 1}, False, False), ({}, True, False)],
)
def test_a_notebook_with_widgets_has_a_bar_of_its_own(
    monkeypatch: pytest.MonkeyPatch, shell: dict[str, int] | None, widgets: bool, notebook: bool
) -> None:
    if shell is not None:
        kernel = SimpleNamespace(get_ipython=lambda: SimpleNamespace(config=shell))
        monkeypatch.setitem(sys.modules, "IPython", kernel)
    else:
        monkeypatch.delitem(sys.modules, "IPython", raising=False)
    monkeypatch.setattr(progress.importlib.util, "find_spec", lambda name: object() if widgets else None)
    assert progress._is_notebook() == notebook
    monkeypatch.setitem(sys.modules, "tqdm.auto", SimpleNamespace(tqdm=lambda **options: options))
    bar = progress._bar(total=3)
    assert bar == {"total": 3} if notebook else bar.disable  # standard error is no terminal here


@pytest.mark.parametrize(("value", "raised"), [("1", True), ("full", True), ("0", False), ("", False), (None, False)])
def test_who_wants_a_traceback_has_the_error_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str | None, raised: bool
) -> None:
    for error, code in ((InputError("wrong"), 2), (RunError("lost"), 1), (ZeroDivisionError("odd"), 1)):

        def refuse(arguments: list[str], error: Exception = error) -> list[str]:
            raise error

        monkeypatch.setattr(__main__, "as_multirun", refuse)
        monkeypatch.setattr(sys, "argv", ["fl-attack", "rounds=1"])
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        if value is not None:
            monkeypatch.setenv("HYDRA_FULL_ERROR", value)
        with pytest.raises(type(error) if raised else SystemExit) as caught:
            __main__.main()
        assert caught.value is error if raised else caught.value.code == code  # type: ignore[attr-defined]
        assert bool(capsys.readouterr().err) != raised


@pytest.mark.parametrize(
    ("signalled", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted("interrupted; nothing was done yet", 143), 143, "interrupted; nothing was done yet"),
        (Interrupted("", 130), 130, "interrupted"),
    ],
)
def test_signals_end_the_command_with_their_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], signalled: BaseException, code: int, said: str
) -> None:
    with pytest.raises(SystemExit) as ended, __main__._ending_in_a_line(True):
        raise signalled
    assert ended.value.code == code and capsys.readouterr().err == f"fl-attack: {said}\n"
    with pytest.raises(Interrupted, match="terminated") as terminated:
        __main__._terminated(15, None)
    assert terminated.value.code == 143


@pytest.mark.parametrize(
    ("error", "line", "or_type"),
    [
        (ValueError("two\n  lines\tof  text "), "two lines of text", "two lines of text"),
        (ValueError(" \n"), "", "ValueError"),
    ],
)
def test_the_message_of_an_error_is_one_line(error: Exception, line: str, or_type: str) -> None:
    assert (one_line(error), message_or_type(error)) == (line, or_type)


def test_the_table_of_a_run_shows_its_numbers_under_their_names() -> None:
    one = {"final_accuracy": 0.91239, "minimum_accuracy": 0.5, "final_f1": 0.25, "flips_per_round": 1234.56}
    one |= {"flips": 1234567, "global_budget": 0.15004, "effective_budget": 0.0756, "seconds": 12.34}
    one |= {"best_round": 50, "rounds": 50, "stopped_round": 50}
    two = one | {"flips": 0, "flips_per_round": 0.0, "final_accuracy": 0.95}
    header, first, second = results.table({"attacked": one, "honest": two}).splitlines()
    words = re.split(r"\s{2,}", header.strip())
    assert dict(zip(words, first.split()[1:], strict=True)) == {
        "final accuracy": "0.9124",
        "minimum accuracy": "0.5000",
        "final F1": "0.2500",
        "flips a round": "1234.6",
        "flips": "1,234,567",
        "global budget": "0.150",
        "effective": "0.076",
        "seconds": "12.3",
    }
    assert first.split()[0] == "attacked" and second.split()[:2] == ["honest", "0.9500"]
    assert len(header) == len(first) == len(second)
    early = results.table({"attacked": one, "honest": two | {"best_round": 20, "stopped_round": 30}}).splitlines()
    assert early[0].endswith("best round") and early[1].endswith("50 of 50") and early[2].endswith("20 of 30")
