"""The page of results: what it holds, and what a browser shows when it is opened and clicked."""

import base64
import io
import json
import math
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import browser
import matplotlib.image
import numpy as np
import pytest

from fl_attack import data, load, report, run, sweep
from fl_attack.config import compose, overrides_of
from fl_attack.data import Dataset
from fl_attack.launcher import grid
from fl_attack.plots.canvas import captured
from fl_attack.report import runs
from fl_attack.report.runs import picture, png
from fl_attack.report.sweeps import command_of, of_sweep

Command = Callable[..., tuple[int, str, str]]
SMALL = ("dataset=digits", "engine=batched", "rounds=30", "attack.start=11", "attack.stop=20", "attack.budget=0.5")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run, another, and a sweep."""
    at = tmp_path_factory.mktemp("results")
    budgets = {"attack.budget": [0.1, 1.0], "strategy": ["mean", "median"], "attack.goal": ["targeted", "untargeted"]}
    with captured():  # figures take time
        run(*SMALL, out=at / "one")
        run(*SMALL, "strategy=median", out=at / "two", report=False)
        sweep("dataset=digits_01", "engine=batched", "rounds=5", grid=budgets | {"seed": range(2)}, out=at / "grid")
    return [at / "one", at / "two", at / "grid"]


def content(file: Path) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text(), re.S)
    assert found
    parts: list[dict[str, Any]] = json.loads(found[1])["parts"]
    return parts


def test_every_run_and_sweep_leaves_a_page_unless_told_not_to(folders: list[Path]) -> None:
    assert [(folder / "report.html").exists() for folder in folders] == [True, False, True]
    text = (folders[0] / "report.html").read_text()
    assert not re.search(r"(src|href)=\"?(https?:)?//|@import|url\(", text) and len(text) < 2e5


def test_the_page_of_a_run_holds_its_numbers(folders: list[Path]) -> None:
    (part,) = content(folders[0] / "report.html")
    there = load(folders[0])
    assert part["rounds"]["test_accuracy"] == pytest.approx(there.rounds["test_accuracy"], rel=1e-5)
    assert there.baseline is not None
    assert part["honest"]["test_loss"] == pytest.approx(there.baseline.rounds["test_loss"], rel=1e-5)
    assert part["window"] == [11, 20, 1] and part["summary"]["flips"] == len(there.flips) > 0
    y = data.load("digits").y_train
    counts = np.array(part["flips"]["counts"])
    spans = np.searchsorted(part["flips"]["edges"], there.flips["round"]) - 1
    for span, true, label in np.ndindex(counts.shape):
        here = (spans == span) & (y[there.flips["sample"]] == true) & (there.flips["label"] == label)
        assert counts[span, true, label] == here.sum()
    assert sum(part["clients"]["flips"]) == len(there.flips)
    assert not any(n for n, bad in zip(part["clients"]["flips"], part["clients"]["malicious"], strict=True) if not bad)
    most = part["samples"][0]
    times = there.flips["sample"].value_counts()
    assert most["times"] == times.max() == times[most["sample"]] and most["label"] == str(y[most["sample"]])
    assert sum(most["to"].values()) == most["times"] and most["picture"].startswith("data:image/png;base64,")


def test_a_picture_is_the_sample() -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3) * 13
    content = png(pixels)
    at = content.index(b"IDAT")
    (size,) = struct.unpack(">I", content[at - 4 : at])
    lines = np.frombuffer(zlib.decompress(content[at + 4 : at + 4 + size]), np.uint8).reshape(2, 10)
    assert (lines[:, 1:].reshape(2, 3, 3) == pixels).all() and not lines[:, 0].any()
    assert struct.unpack(">IIBB", content[16:26]) == (3, 2, 8, 2)
    assert picture(data.load("digits"), 3) is not None


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["dataset=digits_01", "attack.goal=targeted", "clients.total=20", "lr=0.05"],
        ["attack=none", "strategy=trimmed_mean", "strategy.f=2", "strategy.pre=[nnm,{bucketing:{s:2}}]"],
        ["strategy=flower", "strategy.path=flwr.serverapp.strategy.FedMedian", "partition=dirichlet"],
        ["model=mlp", "model.args.widths=[32]", "attack=alie", "attack.args.z=1.5", "batch_size=full", "out=x"],
        ["dataset=mnist_01", "dataset.root=/a path/x", "early_stop.patience=3", "engine=batched"],
    ],
)
def test_settings_come_of_their_overrides_again(given: list[str]) -> None:
    settings = compose(*given)
    again = compose(*overrides_of(settings), f"out={settings.out}")
    assert again == settings


def test_each_cell_has_the_command_that_runs_it(folders: list[Path]) -> None:
    (part,) = content(folders[2] / "report.html")
    assert part["varied"] == ["attack.budget", "strategy", "attack.goal"]
    where = ["dataset=digits_01", "engine=batched", "rounds=5", "out=x"]
    cells = grid("attack.budget=0.1,1.0", "strategy=mean,median", "attack.goal=targeted,untargeted", "seed=0,1", *where)
    assert len(cells) == len(part["commands"]) == 16
    for text, cell in list(zip(part["commands"], cells, strict=True))[1::5]:
        assert compose(*text.split()[1:], "out=x") == cell.settings
    attacks = grid("attack=none,alie,greedy", "seed=1", "out=x")
    base = overrides_of(attacks[2].settings.model_copy(update={"rounds": 7}))
    assert command_of([*base, "attack.scope=per_client"], {"attack": "none", "seed": 1}) == (
        "fl-attack rounds=7 attack=none seed=1"
    )


def test_a_page_holds_no_more_cells_than_browsers_bear(folders: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fl_attack.report.sweeps.ROWS", 3)
    part = of_sweep(load(folders[2]))
    assert part["cells"] == 16 and len(part["commands"]) == 3
    assert {len(column) for column in part["columns"].values()} == {3}
    assert part["varied"] == ["attack.budget", "strategy", "attack.goal"]


def test_a_column_of_one_value_is_no_axis(tmp_path: Path) -> None:
    with captured():
        sweep("dataset=digits_01", "engine=batched", "rounds=2", grid={"attack.budget": [0.5]}, out=tmp_path / "one")
    (part,) = content(tmp_path / "one" / "report.html")
    assert "attack.budget" in part["columns"] and part["varied"] == []


def test_a_sweep_has_what_the_page_s_filters_and_intervals_are_made_of(folders: list[Path]) -> None:
    (part,) = content(folders[2] / "report.html")
    table = load(folders[2]).table
    assert part["cells"] == len(table)
    for name in part["varied"]:  # each is an axis or a filter, of these values
        assert part["columns"][name] == table[name].tolist()
    assert (part["factors"]["final_accuracy"], part["factors"]["final_loss"]) == (100, 1)  # per cent, nats
    assert part["t"][:2] == pytest.approx([12.7062, 4.30265], rel=1e-5)  # Student's, 95 %, of 2 and 3 seeds
    assert {"final_accuracy", "final_loss", "flips"} <= {*part["results"]} and "error" not in part["results"]
    assert {*part["results"]} <= {*part["labels"]}  # what is in the menu has a word for people
    numbers = {name for name in part["results"] if any(isinstance(one, float | int) for one in part["columns"][name])}
    assert numbers == {*part["results"]}


def test_the_command_joins_folders_and_refuses_what_is_no_result(folders: list[Path], command: Command) -> None:
    at = folders[0].parent
    code, stderr, _ = command("report", *map(str, folders), "--out", str(at / "all.html"))
    assert code == 0 and stderr.strip() == str(at / "all.html")
    assert [part["kind"] for part in content(at / "all.html")] == ["run", "run", "sweep"]
    code, _, stderr = command("report", str(at))
    assert code == 2 and stderr.count("\n") == 1 and "holds no result" in stderr


def test_what_users_name_is_text_and_no_script(folders: list[Path], tmp_path: Path) -> None:
    name = tmp_path / "<script>x"
    run("engine=batched", rounds=1, attack="none", out=name)
    assert "<script>x" not in (name / "report.html").read_text().replace("\\u003c", "<").split("application/json")[0]
    (part,) = content(name / "report.html")
    assert part["name"] == str(name) and part["flips"] is None


def test_the_script_of_the_page_reads_what_the_page_holds(folders: list[Path]) -> None:
    script = (Path(report.__file__).parent / "page.js").read_text()
    (run_,), (sweep_,) = (content(folder / "report.html") for folder in (folders[0], folders[2]))
    held = {*run_, *sweep_, *run_["clients"], *run_["flips"], *run_["samples"][0]}
    assert not [key for key in held if not re.search(rf"\b{key}\b", script)]
    assert (run_["kind"], sweep_["kind"], sweep_["name"]) == ("run", "sweep", str(folders[2]))
    assert run_["name"] == str(folders[0]) and run_["attacked"] is True and sweep_["broken_off"] == 0


def test_numbers_of_a_page_have_six_digits_and_are_finite() -> None:
    tree = {1: np.array([[0.123456789, np.nan]]), "b": (np.int64(3), np.float64(np.inf), True, None, "</script>")}
    page = report.render([tree])
    found = re.search(r'id="data">(.*?)</script>', page, re.S)
    assert found and json.loads(found[1]) == {
        "parts": [{"1": [[0.123457, None]], "b": [3, None, True, None, "</script>"]}],
    }
    assert not re.search(r"/\*(STYLE|SCRIPT|DATA)\*/", page)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_picture_file_is_whole_and_says_its_colours(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, channels), np.uint8)
    content = png(pixels)
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and content[25] == {1: 0, 3: 2, 4: 6}[channels]
    place, kinds = 8, []
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        part = content[place + 4 : place + 8 + size]
        assert struct.unpack(">I", content[place + 8 + size : place + 12 + size]) == (zlib.crc32(part),)
        kinds.append(part[:4])
        place += 12 + size
    assert kinds == [b"IHDR", b"IDAT", b"IEND"] and content[26:29] == bytes(3)
    assert (
        matplotlib.image.imread(io.BytesIO(content)).reshape(pixels.shape) * 255
    ).round().tolist() == pixels.tolist()


def images(shape: tuple[int, ...], last: bool, scale: float = 255.0) -> Dataset:
    """A data set of images of this shape, of two classes in turn."""
    x = np.arange(6 * np.prod(shape), dtype=np.float32).reshape(6, -1)
    found = SimpleNamespace(x_train=x, y_train=np.arange(6) % 2, classes=["no", "yes"], scale=scale, shape=shape)
    channels_first = (shape[-1], *shape[:-1]) if last else shape
    found.image_shape, found.channels_last = channels_first, last
    return found  # type: ignore[return-value]


def shown(address: str) -> np.ndarray:
    """The pixels of a picture, 0 to 255."""
    content = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return (matplotlib.image.imread(io.BytesIO(content)) * 255).round()


def test_a_sample_is_shown_with_its_channels_in_place() -> None:
    for last, shape in ((True, (2, 4, 3)), (False, (3, 2, 4))):
        dataset = images(shape, last)
        wanted = np.asarray(dataset.x_train[2]).reshape(shape)
        wanted = wanted if last else wanted.transpose(1, 2, 0)
        address = picture(dataset, 2)
        assert address is not None and shown(address).tolist() == wanted.tolist()
    bright = picture(images((1, 2, 4), False, scale=20.0), 2)
    assert (
        bright is not None
        and shown(bright).tolist() == np.minimum(np.arange(16.0, 24) / 20 * 255, 255).round().reshape(2, 4).tolist()
    )
    assert picture(images((2, 3, 3), False), 0) is None and picture(images((12,), False), 0) is None


class Flipped(NamedTuple):
    """A result of which the page asks for the flips alone."""

    flips: dict[str, np.ndarray]

    def columns(self, name: str) -> dict[str, np.ndarray]:
        assert name == "flips"
        return self.flips


def flipped(round_: list[int], sample: list[int], label: list[int]) -> Any:
    return Flipped({"round": np.array(round_, int), "sample": np.array(sample, int), "label": np.array(label, int)})


def test_flips_are_counted_by_their_rounds_and_of_an_unknown_data_set_from_any_class() -> None:
    settings = compose("rounds=60", "out=x")
    one = flipped([1, 2, 3, 60, 60], [5, 5, 2, 2, 4], [0, 0, 1, 2, 1])
    found = runs._flips(one, settings, None)
    edges, counts = found["flips"]["edges"], np.array(found["flips"]["counts"])
    assert (edges[0], edges[-1], len(edges)) == (0, 60, 25) and counts.shape == (24, 1, 3)
    assert (found["flips"]["from"], found["flips"]["to"]) == (["any"], ["0", "1", "2"])
    assert counts[0].tolist() == [[2, 0, 0]] and counts[1].tolist() == [[0, 1, 0]]  # rounds 1 and 2; 3 to 5
    assert counts[-1].tolist() == [[0, 1, 1]] and counts.sum() == 5 and found["flips"]["left_out"] == 0
    plain = {"label": None, "picture": None}
    assert found["samples"] == [
        {"sample": 2, "times": 2, "to": {"1": 1, "2": 1}} | plain,
        {"sample": 5, "times": 2, "to": {"0": 2}} | plain,
        {"sample": 4, "times": 1, "to": {"1": 1}} | plain,
    ]
    assert runs._flips(flipped([], [], []), settings, None) == {"flips": None, "samples": []}
    known = runs._flips(flipped([1, 2], [0, 5], [1, 0]), compose("rounds=3", "out=x"), images((1, 2, 2), False))
    assert known["flips"]["edges"].tolist() == [0, 1, 2, 3] and known["flips"]["from"] == ["no", "yes"]
    assert known["flips"]["counts"].tolist() == [[[0, 1], [0, 0]], [[0, 0], [1, 0]], [[0, 0], [0, 0]]]
    assert [(one["label"], one["to"]) for one in known["samples"]] == [("no", {"yes": 1}), ("yes", {"no": 1})]
    assert all(one["picture"].startswith("data:") for one in known["samples"])
    beyond = runs._flips(flipped([1], [6], [1]), settings, images((1, 2, 2), False))  # another data set than the run's
    assert beyond["flips"]["from"] == ["any"] and beyond["samples"][0]["picture"] is None
    many = runs._flips(flipped([1] * 26, [*range(26)], [*range(26)]), settings, None)
    assert many["flips"]["counts"].shape == (24, 1, 20) and many["flips"]["left_out"] == 6
    assert len(many["flips"]["to"]) == 20 and [one["sample"] for one in many["samples"]] == [*range(24)]


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    for count in (3, 400, 401, 5000):
        columns = {"round": np.arange(count), "test_accuracy": np.arange(count) / count}
        found = runs._curves(SimpleNamespace(columns=lambda name, columns=columns: columns))  # type: ignore[arg-type]
        assert len(found["round"]) == min(count, 400) and (found["round"][0], found["round"][-1]) == (0, count - 1)
        np.testing.assert_allclose(found["test_accuracy"], found["round"] / count)
        assert np.diff(found["round"]).max() <= -(-count // 400) + 1


def test_a_page_that_cannot_be_written_is_told_and_no_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    report.offer([tmp_path])
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("no report was written: ") and "holds no result" in told
    monkeypatch.setattr(report, "write", lambda folders: folders)
    report.offer([tmp_path])
    assert capsys.readouterr() == ("", "")


def test_a_command_of_a_cell_has_its_values_as_they_are_typed() -> None:
    row = {"attack.budget": 0.25, "rounds": 5.0, "lr": np.float64(2.0), "attack.stop": math.nan, "model": ""}
    found = command_of(["rounds=7", "attack=greedy", "lr=0.5"], row | {"strategy": "krum", "seed": 3})
    assert found == "fl-attack attack=greedy rounds=5 lr=2 strategy=krum seed=3 attack.budget=0.25"


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[browser.Browser]:
    if browser.find() is None:
        pytest.skip("needs Chromium (apt-get install chromium)")
    opened = browser.Browser(tmp_path_factory.mktemp("profile"))
    yield opened
    opened.close()


def choosing(part: str, control: str, value: str) -> str:
    """A script that chooses a value of a control of a part."""
    chosen = f"const s = {control.format(part)}; s.value = '{value}'; s.dispatchEvent(new Event('change'))"
    return "{" + chosen + "}"


def rounded(value: float) -> str:
    """A number as the page shows it: to four digits."""
    return f"{float(f'{value:.4g}'):g}"


@pytest.mark.slow
def test_a_browser_shows_and_clicks_it(folders: list[Path], window: browser.Browser, tmp_path: Path) -> None:
    file = report.write(folders, tmp_path / "all.html")
    window.open(file)
    assert window.do("document.querySelectorAll('section.part').length") == 4  # with the comparison
    assert window.do("[...document.querySelectorAll('.samples img')].every(one => one.complete && one.naturalWidth)")
    one = "document.querySelectorAll('section.part')[1]"
    assert window.do(f"{one}.querySelectorAll('path[data-line]').length") >= 4
    before = window.do(f"{one}.querySelector('path[data-line=attacked]').getAttribute('d')")
    window.do(choosing(one, "{}.querySelector('select')", "test_loss"))
    assert window.do(f"{one}.querySelector('path[data-line=attacked]').getAttribute('d')") != before
    # a chart and a heat map are read by keyboard
    window.do(f"{one}.querySelector('svg.lines').focus()")
    window.press("ArrowLeft")
    assert "round 29" in window.do("document.getElementById('tip').textContent")
    sweep_ = "document.querySelectorAll('section.part')[3]"
    window.do(f"{sweep_}.querySelector('rect[tabindex=\"0\"]').focus()")
    window.press("ArrowRight")
    window.press("Enter")
    shown = window.do(f"{sweep_}.querySelector('.command').textContent")
    assert shown in content(file)[2]["commands"] and "attack.budget=1" in shown
    focused = window.do("document.activeElement.getAttribute('aria-label')")
    table = load(folders[2]).table
    first = table[
        (table["attack.budget"] == 1.0) & (table["strategy"] == "mean") & (table["attack.goal"] == "targeted")
    ]
    mean = 100 * first["final_accuracy"].mean()
    assert f"{rounded(mean)} ±" in focused
    # a filter changes what is shown
    window.do(choosing(sweep_, "[...{}.querySelectorAll('select')].at(-1)", "untargeted"))
    other = table[(table["attack.budget"] == 1.0) & (table["strategy"] == "mean")]
    mean = 100 * other[other["attack.goal"] == "untargeted"]["final_accuracy"].mean()
    label = window.do(f"{sweep_}.querySelectorAll('rect[role=gridcell]')[1].getAttribute('aria-label')")
    assert rounded(mean) in label
    assert window.problems == []


@pytest.mark.slow
def test_it_fits_a_phone_in_the_dark(folders: list[Path], window: browser.Browser, tmp_path: Path) -> None:
    window.open(report.write(folders, tmp_path / "all.html"), width=360, height=740, dark=True)
    assert window.do("document.documentElement.scrollWidth") <= 360
    dark = window.do("getComputedStyle(document.body).backgroundColor")
    window.do("document.getElementById('theme').click()")
    assert window.do("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)" != dark
    assert window.problems == []
