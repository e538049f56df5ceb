"""The federation on Flower and Ray; nothing outside this package imports Flower."""

from fl_attack.federation.client import client_app
from fl_attack.federation.session import Federate, Runner, check, ray_session, run, serve
from fl_attack.federation.tasks import scatter

__all__ = ["Federate", "Runner", "check", "client_app", "ray_session", "run", "scatter", "serve"]
