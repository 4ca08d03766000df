"""Training loops on accelerate, for methods that train more than once."""

from hf_approx.loops.tickets import Ticket, TicketConfig, TicketSearch, pareto_front, search_in_parallel

__all__ = ["Ticket", "TicketConfig", "TicketSearch", "pareto_front", "search_in_parallel"]
