"""Training loops on accelerate, for methods that train more than once."""

from hf_approx.loops.rounds import Rounds, Ticket, TicketConfig
from hf_approx.loops.tickets import TicketSearch, pareto_front, search_in_parallel

__all__ = ["Rounds", "Ticket", "TicketConfig", "TicketSearch", "pareto_front", "search_in_parallel"]
