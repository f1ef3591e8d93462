"""Sartor: cut a pre-trained model to fit one person's data and one device."""

from sartor.api import compress, export, load, probe
from sartor.pipeline import Compressed, apply_plan, make_plan
from sartor.plan import Budget, Plan
from sartor.probing import Texts
from sartor.storage import save

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Compressed",
    "Plan",
    "Texts",
    "apply_plan",
    "compress",
    "export",
    "load",
    "make_plan",
    "probe",
    "save",
]
