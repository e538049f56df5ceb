"""The outcomes of cells that were run together, and the rounds in which cells are measured."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fl_attack.config import Settings
from fl_attack.engine import sequential
from fl_attack.engine.attackers import Attackers
from fl_attack.engine.log import Log
from fl_attack.engine.outcome import Outcome
from fl_attack.engine.stopping import Measurable, Stopping
from fl_attack.scenario import Scenario


def evaluated_rounds(settings: Settings) -> set[int]:
    """The rounds after which models are measured: 0, which is the start, every `eval_every`-th and the last."""
    rounds, every = settings.rounds, settings.eval_every
    return {0, *range(every, rounds + 1, every), rounds}


def measure(
    round_: int,
    theta: Tensor,
    test_set: Measurable,
    log: Log,
    attackers: Sequence[Attackers],
    stopping: Stopping | None,
) -> bool:
    """Note how good cells are after a round, in their log and for their early stopping.

    Parameters
    ----------
    round_ : int
        The round; 0 is before the first.
    theta : (M rows, columns) tensor
        The parameters of the cells after it.
    test_set : Measurable
        The samples that they are measured on.
    log : Log
        Gets a row for each cell.
    attackers : sequence of Attackers
        Those of all tiles, in the order of the cells, after the round.
    stopping : Stopping or None
        Their early stopping; None where they have none.

    Returns
    -------
    bool
        Whether none of the cells need go on, see `Stopping.note`.
    """
    losses = stopping.losses(theta) if stopping else np.nan
    log.measure(round_, test_set.quality(theta), losses, attackers if round_ else [])
    return stopping is not None and stopping.note(round_, np.asarray(losses), theta, _flips(attackers))


def outcomes(
    cells: Sequence[Scenario],
    theta: Tensor,
    parameters: Callable[[Tensor], Tensor] | None,
    log: Log,
    attackers: Sequence[Attackers],
    stopping: Stopping | None,
    seconds: float,
    ended: bool = True,
) -> list[Outcome]:
    """The outcome of each cell; one that diverged is run again client by client, to end with the round where it did.

    Parameters
    ----------
    cells : sequence of Scenario
        M cells of one group.
    theta : (M rows, columns) tensor
        The parameters of the cells after the last round.
    parameters
        A function that gives the whole parameters (A, B) of a cell from its rows of theta; None: they are not kept.
    log : Log
        The rows and flips of the cells.
    attackers : sequence of Attackers
        Those of all tiles, in the order of the cells, after the last round.
    stopping : Stopping or None
        Their early stopping, whose models they give in place of theta; None where they have none.
    seconds : float
        The time that all cells took together, of which each gets an equal share.
    ended : bool
        False before the last round: then the outcomes are those so far, and no cell is run again.

    Returns
    -------
    list of Outcome
        In the order of the cells. One that is run again holds its flips, its parameters and all columns of its rows,
        whatever is kept of the others.
    """
    M = len(cells)
    finite = theta.view(M, -1).isfinite().all(1).cpu().numpy()
    flips, last = _flips(attackers), np.full(M, cells[0].settings.rounds)
    if stopping:
        finite |= stopping.over
        theta, flips, last = stopping.given, stopping.flips, stopping.rounds
    found = []
    for i, (cell, rows) in enumerate(zip(cells, theta.chunk(M), strict=True)):
        if not finite[i] and ended:
            outcome = sequential.run(cell, client_by_client=True)
        else:
            whole = parameters(rows) if parameters else None
            outcome = Outcome(log.table(i, last[i]), int(flips[i]), whole, log.flips(i, last[i]))
        outcome.seconds = seconds / M
        found.append(outcome)
    return found


def _flips(attackers: Sequence[Attackers]) -> NDArray[np.int64]:
    """The number of flips of each cell in all rounds so far, (M,)."""
    return np.concatenate([some.flips for some in attackers])
