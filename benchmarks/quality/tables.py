"""The paper's tables as rows of settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from benchmarks.quality.pairs import Pair
from benchmarks.quality.schemes import RowWise
from benchmarks.quality.settings import NONE, OTHER, OWN, WRITTEN, Setting, references, setting
from vllm_prinmix.compress.methods import registry
from vllm_prinmix.compress.methods.delta_come import DeltaCome
from vllm_prinmix.compress.ratio import as_text

OURS, PAPER, BEST_BASELINE = "prinmix", "prinmix-paper", "delta-come"
ACTIVE = (2, 3, 4, 5, 6)  # f_max of Table 4
SIZES = (16, 32, 64, 128, 256)  # Table 10
HIGHEST = (4, 5, 6, 7, 8)  # widest candidate, Table 13
# What stands in for methods that cannot reach 1/16: GPTQ's one bit per weight and grid per row is just more.
LEAST: dict[str, dict[str, Any]] = {"gptq": {"bits": (1,)}}
DISTILL = 150  # steps of training the scales
LORA_RATIO = 4  # a LoRA fine-tune's ratio as a part of --ratio, Table 6

TASK, THIRDS, TYPES = "task", "thirds", "types"  # what is shown of each row


@dataclass(frozen=True)
class Row:
    """One line: ``labels`` under the table's ``head``. Without a setting it is skipped for ``reason``."""

    labels: tuple[str, ...]
    setting: Setting | None
    reason: str | None = None


@dataclass(frozen=True)
class Table:
    """``shows``: TASK (exact match, KL, errors), or errors by THIRDS of the layers, for each of the TYPES."""

    name: str
    title: str
    head: tuple[str, ...]
    rows: list[Row]
    shows: str = TASK


@dataclass(frozen=True)
class Choice:
    """What the user chose of methods and ratios."""

    methods: tuple[str, ...]
    ratio: Fraction = Fraction(1, 16)
    ratios: tuple[Fraction, ...] = field(
        default=(Fraction(3, 16), Fraction(2, 16), Fraction(1, 16), Fraction(1, 32))
    )

    def of(self, *names: str) -> list[str]:
        """Those of ``names`` that are chosen."""
        return [name for name in names if name in self.methods]

    def at(self, method: str, ratio: Fraction | None = None) -> Setting:
        """``method`` at a ratio, by default the chosen one, or at the size that it has of its own."""
        if method in LEAST and (ratio or self.ratio) <= Fraction(1, 16):
            return setting(method, None, **LEAST[method])
        return setting(method, None if own_size(method) else ratio or self.ratio)


def main(choice: Choice, pair: Pair) -> Table:
    rows = _references(2)
    for method in choice.methods:
        rows.append(_row(choice, method))
        if method == DeltaCome.name:
            quirk = setting(method, choice.ratio, delta_come_quirk=True)
            rows.append(Row((f"{method}, its program's calibration", as_text(choice.ratio)), quirk))
    return Table("2", "Every method", ("method", "α"), rows)


def active_widths(choice: Choice, pair: Pair) -> Table:
    rows = [_row(choice, method) for method in choice.of(BEST_BASELINE)]
    rows += [
        Row((method, str(n)), setting(method, choice.ratio, max_active_bits=n))
        for method in choice.of(PAPER, OURS)
        for n in ACTIVE
    ]
    return Table("4", f"At most f_max widths, α = {as_text(choice.ratio)}", ("method", "f_max"), rows)


def target_correction(choice: Choice, pair: Pair) -> Table:
    rows = [Row((m,), choice.at(m)) for m in choice.of(BEST_BASELINE, PAPER)]
    rows += [Row((f"{m}, without RTC",), setting(m, choice.ratio, rtc=False)) for m in choice.of(PAPER)]
    rows += [Row((m,), choice.at(m)) for m in choice.of(OURS)]
    return Table("5", f"Reconstruction target correction, α = {as_text(choice.ratio)}", ("method",), rows)


def lora(choice: Choice, pair: Pair) -> Table:
    """Compressing a full fine-tune beside training a LoRA, and compressing that too."""
    small = choice.ratio / LORA_RATIO
    reason = None if pair.lora else "the pair has no LoRA fine-tune (--lora)"
    rows = _references(2)
    whole = replace(references()[1], lora=True)
    rows.append(Row(("LoRA", "dense"), None if reason else whole, reason))
    for method in choice.of(PAPER, OURS):
        rows.append(Row((method, as_text(choice.ratio)), setting(method, choice.ratio)))
        adapter = replace(setting(method, small), lora=True)
        rows.append(Row((f"{method} of LoRA", as_text(small)), None if reason else adapter, reason))
        rows.append(Row((method, as_text(small)), setting(method, small)))
    return Table("6", "Full fine-tune and LoRA", ("method", "α"), rows)


def layer_errors(choice: Choice, pair: Pair) -> Table:
    rows = [
        Row(("base",), references()[0]),
        *(Row((method,), choice.at(method)) for method in choice.methods),
    ]
    title = f"Errors of the linear layers' outputs on held-out text, α = {as_text(choice.ratio)}"
    return Table("7", title, ("method",), rows, THIRDS)


def u_schemes(choice: Choice, pair: Pair) -> Table:
    rows = []
    if choice.of(PAPER):
        for bits in (2, 3):
            rows.append(Row((f"U ({bits} bit), V ({PAPER})",), setting(PAPER, choice.ratio, u_bits=bits)))
        rows.append(Row((f"U (by rows), V ({PAPER})",), setting(RowWise.name, choice.ratio)))
        rows.append(Row((PAPER,), setting(PAPER, choice.ratio)))
    rows += [Row((f"{OURS}: widths of their own",), choice.at(m)) for m in choice.of(OURS)]
    return Table("8", f"Schemes for U, α = {as_text(choice.ratio)}", ("scheme",), rows)


def ratios(choice: Choice, pair: Pair) -> Table:
    rows = []
    for method in choice.methods:
        for ratio in choice.ratios:
            own = own_size(method)
            reason = "its size does not depend on the ratio" if own else None
            rows.append(Row((method, as_text(ratio)), None if own else setting(method, ratio), reason))
    return Table("9", "Ratios", ("method", "α"), rows)


def calibration_size(choice: Choice, pair: Pair) -> Table:
    rows = [
        Row((method, str(size)), replace(choice.at(method), samples=size))
        for method in choice.of(PAPER, OURS)
        for size in SIZES
    ]
    return Table("10", f"Calibration samples, α = {as_text(choice.ratio)}", ("method", "samples"), rows)


def calibration_domain(choice: Choice, pair: Pair) -> Table:
    rows = []
    for method in choice.methods:
        for label, source in (
            ("in-domain", OWN),
            ("other", OTHER),
            ("written by the model", WRITTEN),
            ("no data", NONE),
        ):
            missing = source == OTHER and pair.calibration_other is None
            reason = "the pair has no text of another domain (--calibration-other)" if missing else None
            found = None if missing else replace(choice.at(method), calibration=source)
            rows.append(Row((method, label), found, reason))
    return Table("11", f"Calibration domain, α = {as_text(choice.ratio)}", ("method", "calibration"), rows)


def candidates(choice: Choice, pair: Pair) -> Table:
    rows = []
    for method in choice.of(PAPER, OURS):
        least = 2 if method == PAPER else 1
        for highest in HIGHEST:
            bits = (0, *range(least, highest + 1))
            label = "{" + ", ".join(map(str, bits)) + "}"
            rows.append(Row((method, label), setting(method, choice.ratio, bits=bits)))
    return Table("13", f"Candidate widths, α = {as_text(choice.ratio)}", ("method", "widths"), rows)


def layer_types(choice: Choice, pair: Pair) -> Table:
    table = layer_errors(choice, pair)
    return replace(table, name="15", title=f"{table.title}, by type", shows=TYPES)


def ablation(choice: Choice, pair: Pair) -> Table:
    """What each step of `prinmix` is worth: left out alone, and left out together with all before it."""
    rows = []
    for method in choice.of(OURS):
        rows.append(Row(("all steps", ""), choice.at(method)))
        without = replace(choice.at(method), compensate=False)
        rows.append(Row(("without compensation", "alone"), without))
        rows.append(Row(("budget shared evenly", "alone"), replace(choice.at(method), budget="even")))
        rows.append(Row(("budget of each module", "alone"), replace(choice.at(method), budget="module")))
        steps = [step.replace("_", "-") for step in registry.METHODS[method].steps]
        for step in steps:
            options = registry.without(method, [step])
            rows.append(Row((f"without {step}", "alone"), setting(method, choice.ratio, **options)))
        for count, step in enumerate(steps[1:], 2):
            options = registry.without(method, steps[:count])
            rows.append(Row((f"without {step}", "and all above"), setting(method, choice.ratio, **options)))
        rows += [Row((other, ""), choice.at(other)) for other in choice.of(PAPER)]
    return Table("ablation", f"Steps of {OURS}, α = {as_text(choice.ratio)}", ("steps", ""), rows)


def compensation(choice: Choice, pair: Pair) -> Table:
    """What it is worth to a method that layers are fitted to the compressed ones before (`--compensate`)."""
    rows = []
    for method in choice.methods:
        for ratio in dict.fromkeys((choice.ratio, choice.ratio / 2)):
            found = choice.at(method, ratio)
            label = "its own" if found.ratio is None else as_text(found.ratio)
            for compensate, shown in ((False, ""), (True, "compensated")):
                rows.append(Row((method, label, shown), replace(found, compensate=compensate)))
            if found.ratio is None:
                break
    return Table("compensation", "Layers fitted to the compressed ones before", ("method", "α", ""), rows)


def distillation(choice: Choice, pair: Pair) -> Table:
    """What training the scales (`--distill`) is worth to a method."""
    rows = []
    for method in choice.of("bitdelta", BEST_BASELINE, PAPER, OURS):
        for ratio in dict.fromkeys((choice.ratio, choice.ratio / 2)):
            found = choice.at(method, ratio)
            label = "its own" if found.ratio is None else as_text(found.ratio)
            rows.append(Row((method, label, ""), found))
            rows.append(Row((method, label, "trained"), replace(found, distill=DISTILL)))
            if found.ratio is None:
                break
    return Table("distill", f"Scales trained for {DISTILL} steps", ("method", "α", "scales"), rows)


TABLES: dict[str, Callable[[Choice, Pair], Table]] = {
    "2": main,
    "4": active_widths,
    "5": target_correction,
    "6": lora,
    "7": layer_errors,
    "8": u_schemes,
    "9": ratios,
    "10": calibration_size,
    "11": calibration_domain,
    "13": candidates,
    "15": layer_types,
    "ablation": ablation,
    "compensation": compensation,
    "distill": distillation,
}
SAME = {"3": "2"}  # Table 3 is Table 2 on larger models


def _references(width: int) -> list[Row]:
    return [Row((s.method, *[""] * (width - 1)), s) for s in references()]


def _row(choice: Choice, method: str) -> Row:
    found = choice.at(method)
    return Row((method, "its own" if found.ratio is None else as_text(found.ratio)), found)


def own_size(method: str) -> bool:
    """Whether its size does not depend on a ratio."""
    return setting(method, None).compressor().has_own_size


def settings_of(tables: Sequence[Table]) -> list[Setting]:
    """All settings of the tables, each once."""
    return list(dict.fromkeys(row.setting for table in tables for row in table.rows if row.setting))
