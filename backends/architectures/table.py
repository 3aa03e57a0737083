"""All architectures, and the lookup by class."""

from . import flux
from .data import Architecture

ARCHITECTURES: dict[str, Architecture] = {a.class_name: a for a in (*flux.ARCHITECTURES,)}


def find(network: object) -> Architecture | None:
    """The Architecture of a live network: of its class, else of the nearest base class."""
    names = (cls.__name__ for cls in type(network).__mro__)
    return next((ARCHITECTURES[name] for name in names if name in ARCHITECTURES), None)
