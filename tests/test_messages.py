"""What the program says: what has no effect, what was meant, how far it is; never in a library's words."""

import csv
import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fl_attack import __version__, experiment, multirun, waiting
from fl_attack.config import compose, without_effect
from fl_attack.data import cache
from fl_attack.errors import RunError

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
