"""Figures 1 and 4: gradients that flips within the budget can make in a round of a real run; the greedy ones."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fl_attack import adversary, engine
from fl_attack.config import Settings, compose
from fl_attack.models import logistic
from fl_attack.plots.lines import gradients
from fl_attack.replication.figures import DIGITS
from fl_attack.replication.plan import PaperDataset
from fl_attack.scenario import Scenario
from fl_attack.sweep_table import write_csv

BUDGETS = (0.1, 0.25, 0.5, 1.0)
RANDOM_SETS = 2000  # random sets of flips for each budget


def draw(folder: Path, source: PaperDataset, rate: float) -> str:
    """Draw `fig1-<data set>.{png,pdf,csv}`: gradients after 200 rounds of an untargeted run at each of `BUDGETS`.

    Parameters
    ----------
    folder : Path
        The folder that the files are written to.
    source : PaperDataset
        The data set.
    rate : float
        The learning rate.

    Returns
    -------
    str
        The name of the files, without suffix.
    """
    rounds, overrides = 200, (*source.overrides, f"lr={rate:g}")
    untargeted, targeted = (
        engine.make_scenarios([_settings(overrides, rounds, budget, goal) for budget in BUDGETS])
        for goal in ("untargeted", "targeted")
    )
    rows = []
    runs = engine.run_cells(untargeted, keep_flips=False, full_rows=False)
    for budget, run, away, towards in zip(BUDGETS, runs, untargeted, targeted, strict=True):
        scenarios = {"untargeted": away, "targeted": towards}
        assert run.theta is not None
        rows += [(f"b = {budget:g}", *row) for row in points(scenarios, run.theta.to(torch.float64), rounds)]
    file = write_csv(folder / f"fig1-{source.name}.csv", ("budget", "kind", "first", "second"), rows, DIGITS)
    note = (
        "The gradient of one minibatch: clean, with random flips within the budget, and with the greedy ones. In "
        "lengths of the clean one. First direction: the clean gradient; second: that in which the others differ most. "
        "k = 0.5."
    )
    gradients(file, f"Gradients that the attackers can reach: {source.title}", note)
    return file.stem


def points(
    scenarios: dict[str, Scenario], theta: Tensor, round_: int, draws: int = RANDOM_SETS
) -> list[tuple[str, float, float]]:
    """The gradients of a round along two directions, in lengths of the clean one.

    Parameters
    ----------
    scenarios : dict
        The experiment by goal of its attack, "untargeted" and "targeted"; two classes.
    theta : (C, d) tensor
        The parameters that the round begins with, in float64.
    round_ : int
        The round, which decides the minibatch.
    draws : int
        The number of random sets of flips.

    Returns
    -------
    list of (kind, first, second)
        The first direction is the clean gradient, the second that in which the others differ most.
    """
    base = scenarios["untargeted"]
    samples, counts = base.schedule.samples(base.schedule.participants(round_), round_)
    X, y = base.features(samples).double(), torch.from_numpy(base.dataset.y_train[samples])
    writable = np.flatnonzero(np.isin(base.partition.client[samples], base.partition.malicious))
    chosen = {goal: adversary.flips(one, theta, round_) for goal, one in scenarios.items()}
    allowed = chosen["untargeted"].allowed

    def gradient(labels: Tensor) -> Tensor:
        """The gradient (C d,) of the round under these labels."""
        return logistic.gradient(theta, X, labels, torch.from_numpy(counts).double()).flatten()

    def relabelled(where: np.ndarray, labels: np.ndarray) -> Tensor:
        """The true labels with others at these places of the minibatch."""
        changed = y.clone()
        changed[torch.from_numpy(where)] = torch.from_numpy(labels)
        return changed

    rng = np.random.default_rng(round_)
    random_flips = []
    for _ in range(draws):
        some = rng.choice(writable, rng.integers(1, allowed + 1), replace=False)
        random_flips.append(gradient(relabelled(some, 1 - y.numpy()[some])))
    clean = gradient(y)
    greedy = {
        f"greedy, {goal}": gradient(relabelled(np.searchsorted(samples, flips.samples), flips.labels))
        for goal, flips in chosen.items()
    }
    length = clean.norm()
    first = clean / length
    others = torch.stack([*random_flips, *greedy.values()])
    rest = others - (others @ first)[:, None] * first
    within = torch.linalg.qr(X.mT).Q  # every gradient is a sum of samples: as many directions as these, not features
    second = within @ torch.linalg.svd((rest - rest.mean(0)) @ within, full_matrices=False).Vh[0]
    second *= torch.sign(greedy["greedy, targeted"] @ second)  # else up and down were a matter of chance
    named = [("random flips", one) for one in random_flips] + [("clean", clean), *greedy.items()]
    return [(kind, float(g @ first / length), float(g @ second / length)) for kind, g in named]


def _settings(overrides: tuple[str, ...], rounds: int, budget: float, goal: str) -> Settings:
    """The settings of an attacked run of which five of ten clients are malicious."""
    return compose(
        *overrides,
        "engine=batched",
        "out=unused",
        "clients.total=10",
        "clients.malicious=5",
        f"attack.budget={budget}",
        f"attack.goal={goal}",
        f"rounds={rounds}",
        f"eval_every={rounds}",
        "batch_size=128",
    )
