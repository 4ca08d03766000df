"""Training loops on accelerate, for methods that train more than once or train no weights."""

from hf_approx.loops.calibration import Calibration, calibrate, round_weights
from hf_approx.loops.distillation import Fidelity
from hf_approx.loops.rounds import Rounds, Ticket, TicketConfig
from hf_approx.loops.tickets import TicketSearch, pareto_front, search_in_parallel

__all__ = [
    "Calibration",
    "Fidelity",
    "Rounds",
    "Ticket",
    "TicketConfig",
    "TicketSearch",
    "calibrate",
    "pareto_front",
    "round_weights",
    "search_in_parallel",
]
