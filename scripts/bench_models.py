"""What the attack costs on a network, what stacked parameters gain, and how ByzFL's own loop compares.

    .venv/bin/python scripts/bench_models.py [--models cnn mlp resnet18] [--threads 1] [--cells 32] [--rounds 5]

One attacked step is what the attackers and the server do in a round under the mean: the clean gradient where it is
needed, the forward-mode derivative on the attackers' samples, the choice, and the gradient with the labels written. A
plain step is one gradient of the same minibatch. Batch 128, three of ten clients malicious, b = 1, on generated data
of the shape of MNIST (resnet18: of CIFAR-10). Ratios are of medians of five rounds that take turns; "products" is the
share of a plain step in matrix products and convolutions, by torch's profiler: what no way around them can save.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from fl_attack import adversary, engine
from fl_attack.config import compose
from fl_attack.engine import sequential, stacked
from fl_attack.scenario import Scenario, mean_gradient

clock = time.perf_counter
SHAPES = {"resnet18": (32, 32, 3)}
CLIENTS, MALICIOUS, BATCH = 10, 3, 128
PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm", "convolution_backward", "aten::mkldnn_convolution")
STEPS = 5  # of a measurement: the median of so many is one number
KEPT = {"keep_flips": False, "keep_theta": False}
PATIENCE = 1.0  # seconds of a step that is taken once instead


def data(folder: Path, shape: tuple[int, ...], samples: int = 2000) -> str:
    """A generated data set of ten classes; gives its file."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, samples)
    x = rng.integers(0, 256, (samples, *shape)).astype(np.uint8)
    file = folder / f"data{len(shape)}.npz"
    np.savez(file, x_train=x, y_train=y, x_test=x[:200], y_test=y[:200])
    return str(file)


def cell(file: str, model: str, *more: str) -> Scenario:
    """An experiment on that data."""
    common = [f"clients.honest={CLIENTS - MALICIOUS}", f"clients.malicious={MALICIOUS}", f"batch_size={BATCH}"]
    chosen = compose(
        *common, "out=unused", "engine=batched", "attack.budget=1", "eval_every=100000", f"model={model}", "lr=0.01",
        "dataset=npz", f"dataset.path={file}", *more,
    )  # fmt: skip
    return engine.make_scenarios([chosen])[0]


def seconds(step: Callable[[], object]) -> float:
    """The median time of a step."""
    found = []
    for _ in range(STEPS):
        began = clock()
        step()
        found.append(clock() - began)
        if found[-1] > PATIENCE:
            break
    return statistics.median(found)


def medians(rounds: int, *steps: Callable[[], object]) -> list[float]:
    """The median time of each step, which take turns."""
    for step in steps:
        step()
    measured = [[seconds(step) for step in steps] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*measured, strict=True)]


def plain_step(chosen: Scenario) -> Callable[[], object]:
    """One gradient of a round's minibatch, its samples fetched."""
    theta = chosen.start()

    def step() -> object:
        chosen.memo.pop("gradient", None)
        return mean_gradient(chosen, theta, 1)

    return step


def attacked_step(chosen: Scenario) -> Callable[[], object]:
    """A round of an engine under attack, from theta to the aggregate."""
    theta = chosen.start()
    if chosen.settings.attack.goal == "targeted":
        chosen.memo["target"] = theta + 0.01 * torch.randn_like(theta)
    if stacked.can_run(chosen):
        stack = stacked.Stack([chosen], torch.device("cpu"), 2**30, False, False)
        return lambda: stack.step(1)

    def step() -> object:
        chosen.memo.pop("gradient", None)
        return mean_gradient(chosen, theta, 1, adversary.flips(chosen, theta, 1))

    return step


def share_of_products(step: Callable[[], object]) -> float:
    """The share of a step's processor time in matrix products and convolutions."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as watched:
        step()
    events = watched.key_averages()
    total = sum(event.self_cpu_time_total for event in events)
    return sum(e.self_cpu_time_total for e in events if any(name in e.key for name in PRODUCTS)) / total


def byzfl_step(chosen: Scenario) -> Callable[[], object]:
    """A round as ByzFL's clients and server do it: a gradient of each client in turn, flattened, averaged, set."""
    from byzfl import Average

    module = chosen.model._module  # type: ignore[attr-defined]
    clients = chosen.schedule.participants(1)
    batches = [chosen.batch(*chosen.schedule.samples([client], 1))[:2] for client in clients]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
    average, loss = Average(), torch.nn.CrossEntropyLoss()

    def step() -> object:
        with torch.inference_mode(False), torch.enable_grad():
            flat = []
            for X, y in batches:
                module.zero_grad()
                loss(module(X.clone()), y.clone()).backward()
                flat.append(torch.cat([value.grad.reshape(-1) for value in module.parameters()]))
            gradient = average(flat)
            start = 0
            for value in module.parameters():
                value.grad = gradient[start : start + value.numel()].view_as(value)
                start += value.numel()
            optimizer.step()
        return gradient

    return step


def stack_against_loop(file: str, count: int, rounds: int, steps: int = 20) -> list[tuple[str, float, float]]:
    """Seconds of a round of so many MLP cells in a stack, and one after the other, by goal."""
    found = []
    for goal in ("untargeted", "targeted"):
        first = cell(file, "mlp", f"rounds={steps}", f"attack.goal={goal}")
        target = first.start() + 0.01 * torch.randn_like(first.start())
        cells = []
        for i in range(count):
            threat = first.settings.attack.model_copy(update={"budget": round((i + 1) / count, 3)})
            settings = first.settings.model_copy(update={"attack": threat})
            cells.append(Scenario(settings, first.dataset, first.partition, first.schedule))
            cells[-1].memo["target"] = target

        def together(cells: Sequence[Scenario] = cells) -> object:
            return stacked.run_cells(
                cells,
                device="cpu",
                memory_gb=2,
                progress=lambda n: None,
                watch=lambda *_: None,
                keep_flips=False,
                keep_theta=False,
            )

        def apart(cells: Sequence[Scenario] = cells) -> object:
            return [sequential.run(one, full_rows=False) for one in cells[:4]]

        stack, loop = [], []
        for _ in range(rounds):
            began = clock()
            together()
            between = clock()
            apart()
            stack.append((between - began) / steps / count)
            loop.append((clock() - between) / steps / min(4, count))
        found.append((goal, statistics.median(stack), statistics.median(loop)))
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["mlp", "cnn", "resnet18"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    with TemporaryDirectory() as folder, torch.inference_mode():
        print("model      plain, ms  untargeted  targeted  ByzFL's loop  products")
        for model in chosen.models:
            file = data(Path(folder), SHAPES.get(model, (28, 28)))
            untargeted, targeted = cell(file, model), cell(file, model, "attack.goal=targeted")
            steps = [plain_step(untargeted), attacked_step(untargeted), attacked_step(targeted), byzfl_step(untargeted)]
            plain, *others = medians(chosen.rounds, *steps)
            ratios = "  ".join(f"{one / plain:9.2f}" for one in others)
            print(f"{model:10} {plain * 1e3:9.2f}  {ratios}     {share_of_products(steps[0]):.0%}", flush=True)
        file = data(Path(folder), (28, 28))
        print(f"\n{chosen.cells} cells of the mlp   stack, ms a cell-round   alone   ratio")
        for goal, stack, loop in stack_against_loop(file, chosen.cells, chosen.rounds):
            print(f"{goal:20} {stack * 1e3:17.3f} {loop * 1e3:13.3f} {loop / stack:7.2f}", flush=True)


if __name__ == "__main__":
    main()
