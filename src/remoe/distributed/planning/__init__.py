"""What a parallel layout costs, from formulas and a machine's constants: memory, bytes on the wire, time of a step."""

from remoe.distributed.planning.estimate import Estimate, estimate, estimates
from remoe.distributed.planning.job import Job
from remoe.distributed.planning.machine import Constant, Machine, machine

__all__ = ["Constant", "Estimate", "Job", "Machine", "estimate", "estimates", "machine"]
