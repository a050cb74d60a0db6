"""What one run compresses with: a method, its options, a ratio and calibration data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.schemes import Dense, Reference, RowWise
from vllm_prinmix import compress
from vllm_prinmix.compress.methods import registry
from vllm_prinmix.compress.methods.base import Method
from vllm_prinmix.format.schema import Budget
from vllm_prinmix.kernels.quantized import QuantizedFactors, QuantizedMatrix

# Calibration: in-domain, another domain, written by the fine-tune itself, no data.
OWN, OTHER, WRITTEN, NONE = "own", "other", "written", "none"
# The same optimum as SCIP's, many times faster.
DEFAULTS: dict[str, dict[str, Any]] = {"prinmix-paper": {"solver": "exact"}}
REFERENCES = ("base", "fine-tuned")

Compressor = Method | RowWise | Reference
Change = QuantizedFactors | QuantizedMatrix | Dense


@dataclass(frozen=True)
class Setting:
    """One row of a table but for the seeds. ``ratio`` None: the size that the method has of its own."""

    method: str  # of the registry, or one of REFERENCES, or RowWise.name
    options: tuple[tuple[str, Any], ...] = ()  # other than the method's defaults
    ratio: Fraction | None = None
    calibration: str = OWN
    samples: int = 0  # calibration samples; 0: as many as --samples says
    lora: bool = False  # of the pair's LoRA fine-tune
    budget: Budget = "shared"  # see prepare.Options
    compensate: bool | None = None  # see prepare.Options
    distill: int = 0  # steps of training the scales

    def compressor(self) -> Compressor:
        """Raises PrinMixError for a method or option that does not exist."""
        if self.method in REFERENCES:
            return Reference(self.method)
        if self.method == RowWise.name:
            return RowWise()
        return registry.make(self.method, **(DEFAULTS.get(self.method, {}) | dict(self.options)))

    def shares(self, compressor: Compressor) -> bool:
        """Whether the linear layers share one budget."""
        able = isinstance(compressor, Method) and compressor.has_curve
        return able and self.budget != "module" and self.ratio is not None

    def compensates(self, compressor: Compressor) -> bool:
        """Whether each matrix is fitted to the compressed layers before it."""
        default = isinstance(compressor, Method) and compressor.compensates
        return self.draws and (default if self.compensate is None else self.compensate)

    @property
    def draws(self) -> bool:
        """Whether the result depends on the calibration seed."""
        return self.calibration != NONE

    def __str__(self) -> str:
        options = "".join(f" {name}={value}" for name, value in self.options)
        budget = "" if self.budget == "shared" else f" budget={self.budget}"
        own = "" if self.compensate is None else f" compensate={self.compensate}"
        trained = f" distill={self.distill}" if self.distill else ""
        return f"{self.method}{options}{budget}{own}{trained}{'' if self.ratio is None else f' {self.ratio}'}"


def setting(method: str, ratio: Fraction | None, **options: Any) -> Setting:
    """A setting with in-domain calibration."""
    return Setting(method, tuple(sorted(options.items())), ratio)


def references(lora: bool = False) -> list[Setting]:
    return [Setting(name, calibration=NONE, lora=lora) for name in REFERENCES]


def code_digest() -> str:
    """SHA-256 (hex, 16 digits) of the compressor's sources: results of other code are not taken over."""
    digest = hashlib.sha256(torch.__version__.encode())
    for folder in compress.__path__:
        for path in sorted(Path(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
