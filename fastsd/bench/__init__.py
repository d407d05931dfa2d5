"""How long files take to load and to save, beside what others and the machine itself can do.

`run` measures and gives a `Document`; `report` makes tables of it, `plot` a picture. Every
measurement is a process of its own.
"""

from fastsd.bench.contenders import CONTENDERS, find_contenders
from fastsd.bench.models import Synthetic
from fastsd.bench.results import Document, Limit, Result
from fastsd.bench.runner import Settings, run

__all__ = [
    "CONTENDERS",
    "Document",
    "Limit",
    "Result",
    "Settings",
    "Synthetic",
    "find_contenders",
    "run",
]
