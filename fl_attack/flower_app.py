"""The apps of `flwr run .`: the same clients and strategy, on the grid and with the run configuration of Flower."""

from typing import TYPE_CHECKING, Any

from fl_attack import federation
from fl_attack.errors import InputError, RunError

if TYPE_CHECKING:
    from fl_attack.federation import Runner
    from fl_attack.federation.apps import Make

__all__ = ["client_app", "server_app"]

client_app = federation.client_app


def main(run_config: dict[str, Any], runner: "Runner", make: "Make | None" = None) -> None:
    """Run an experiment and print its summary: what Flower calls on the server.

    Parameters
    ----------
    run_config : dict
        Flower's: settings by their keys, of which empty ones count as not given, and `overrides` as for `fl-attack`.
    runner : federation.Runner
        A function that brings the clients up.
    make : callable, optional
        Gives the scenario of settings; by default `scenario.make`.

    Raises
    ------
    SystemExit
        Where the settings can't be met or the run can't go on, after a line that says why.
    """
    # a client, which Flower starts for each message, needs none of these
    from fl_attack import experiment, results, scenario
    from fl_attack.config import compose
    from fl_attack.overrides import explain

    given = {key: value for key, value in run_config.items() if value != ""}
    overrides = [*str(given.pop("overrides", "")).split(), *(f"{key}={value}" for key, value in given.items())]
    try:
        settings = compose(*overrides)
        print(results.table(experiment.run(settings, runner, make or scenario.make)), flush=True)
        print(f"results in {settings.out}", flush=True)
    except (InputError, RunError) as error:
        print(f"fl-attack: {explain(error)}", flush=True)
        raise SystemExit(1) from error


server_app = federation.serve(main)
