"""Learning at the edge of competence [paper B]: which mixtures of horizons hand learning from easy to hard.

``group`` are finite groups, ``task`` the model (read its head first), ``exact`` expected learning in closed form and as
a flow along the one direction that survives, ``training`` sampled runs through the public API, ``runs`` many of them.
Two experiments: the relay itself (``run`` here) and ``plateau``, how long a level waits for its turn.
"""

from rlvr_fast.simulate.relay.experiment import run

__all__ = ["run"]
