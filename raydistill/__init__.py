"""raydistill: distil large teachers into small students, from cached and verified teacher signals."""

__version__ = "0.1.0"
