"""`prinmix inspect`: what a delta holds, from its description alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Column, Table

from vllm_prinmix.format.checkpoint import EMBEDDING, HEAD
from vllm_prinmix.format.delta import check_weights_size, read_config
from vllm_prinmix.format.payload import payload_bytes
from vllm_prinmix.format.schema import Exact, Factors, Matrix


def describe(folder: Path) -> dict[str, Any]:
    """Everything that `prinmix inspect --json` prints, as plain values.

    ``ratio``: payload bytes / 2 bytes per parameter, of the compressed linear layers (``linear``), of
    embeddings and lm_head (``embedding``, None where unchanged), and the size of delta.safetensors / 2 bytes
    per parameter of the whole checkpoint (``whole``). Raises PrinMixError where the folder is no whole delta.
    """
    config = read_config(folder)
    check_weights_size(folder, config)
    modules = [_module(name, spec) for name, spec in config.modules.items() if not isinstance(spec, Exact)]
    whole = {"bytes": config.weights.bytes, "dense_bytes": 2 * config.base.parameters}
    return {
        "folder": str(folder),
        **config.model_dump(
            mode="json",
            include={
                "format_version",
                "tool",
                "base",
                "finetuned",
                "settings",
                "calibration",
                "distillation",
            },
        ),
        "ratio": {
            "linear": _ratio([m for m in modules if m["name"] not in (EMBEDDING, HEAD)]),
            "embedding": _ratio([m for m in modules if m["name"] in (EMBEDDING, HEAD)]),
            "whole": whole | {"ratio": whole["bytes"] / whole["dense_bytes"]},
        },
        "modules": modules,
        "exact": [name for name, spec in config.modules.items() if isinstance(spec, Exact)],
        "unchanged": config.unchanged,
    }


def _module(name: str, spec: Factors | Matrix) -> dict[str, Any]:
    rows, cols = spec.shape
    size = payload_bytes(spec)
    if isinstance(spec, Matrix):
        classes = [{"bits": spec.bits, "rows": rows}]
    else:
        classes = [c.model_dump() for c in spec.classes]
    return {
        "name": name,
        "kind": spec.kind,
        "shape": [rows, cols],
        "bytes": size,
        "dense_bytes": 2 * rows * cols,
        "ratio": size / (2 * rows * cols),
        "classes": classes,
        "report": spec.report,
    }


def _ratio(modules: list[dict[str, Any]]) -> dict[str, Any] | None:
    if not modules:
        return None
    size, dense = sum(m["bytes"] for m in modules), sum(m["dense_bytes"] for m in modules)
    return {"bytes": size, "dense_bytes": dense, "ratio": size / dense}


def show(description: dict[str, Any], console: Console) -> None:
    """The description as text and one table."""
    settings, base, calibration = description["settings"], description["base"], description["calibration"]
    console.print(
        f"{description['folder']}: {description['finetuned']}, a fine-tune of {base['name']}",
        style="bold",
        markup=False,
    )
    console.print(
        f"made by {description['tool']}, format {description['format_version']}, "
        f"method {settings['method']}"
        + "".join(f", {name.replace('_', ' ')} {_value(v)}" for name, v in settings["options"].items()),
        markup=False,
    )
    if calibration:
        console.print(
            f"calibrated on {calibration['samples']} samples ({calibration['tokens']} tokens) "
            f"of {calibration['source']}, seed {calibration['seed']}",
            markup=False,
        )
    else:
        console.print("made without calibration data")
    if trained := description["distillation"]:
        console.print(
            f"scales trained for {trained['steps']} steps, best after {trained['best_step']}: KL to the "
            f"fine-tune on held-out samples {trained['kl_before']:.3g} -> {trained['kl_after']:.3g} nats per "
            "token",
            markup=False,
        )
    console.print(f"base content digest {base['content_digest']}", soft_wrap=True)
    console.print(_table(description["modules"]))
    at = ", as the compressed model has them; dW is corrected there for the errors of the layers before"
    at = at if description["settings"]["compensated"] else ""
    inputs = f"on the calibration inputs X{at}" if calibration else "with H = X X^T of `--calibration none`"
    console.print(f"error: ||dW X - dW^ X||^2 / ||dW X||^2 {inputs}", highlight=False)
    for name, text in (
        ("linear", "linear layers"),
        ("embedding", "embedding, lm_head"),
        ("whole", "whole checkpoint"),
    ):
        part = description["ratio"][name]
        if part is None:
            console.print(f"{text}: unchanged")
        else:
            console.print(
                f"{text}: {part['bytes']:,} of {part['dense_bytes']:,} bytes, "
                f"ratio {part['ratio']:.4f}" + (f" (1/{1 / part['ratio']:.1f})" if part["ratio"] else "")
            )
    console.print(
        f"stored exactly: {len(description['exact'])} tensors; unchanged: {len(description['unchanged'])}"
    )


def _value(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(modules: list[dict[str, Any]]) -> Table:
    classes = Column("directions x bits of V/U", overflow="fold")
    table = Table(Column("module", no_wrap=True), "shape", "ratio", classes, "error")
    for module in modules:
        error = module["report"].get("error")
        table.add_row(
            module["name"].removeprefix("model.").removesuffix(".weight"),
            " x ".join(map(str, module["shape"])),
            f"{module['ratio']:.4f}",
            " ".join(_class_text(c) for c in module["classes"]),
            "" if error is None else f"{error:.3g}",
        )
    return table


def _class_text(c: dict[str, int]) -> str:
    return (
        f"{c['directions']}x{c['v_bits']}/{c['u_bits']}"
        if "directions" in c
        else f"{c['rows']} rows x {c['bits']}"
    )
