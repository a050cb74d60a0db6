"""prinmix_config.json as types. Unknown fields are an error: a newer writer must not be half understood."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

FORMAT_VERSION: Literal[1] = 1
CONFIG_FILE = "prinmix_config.json"
WEIGHTS_FILE = "delta.safetensors"

Bits = Annotated[int, Field(ge=1, le=8)]
Shape = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1)]
MatrixShape = tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]]
# The linear layers' bytes: shared by what errors do to the predictions, shared with all relative errors
# counting alike, or each matrix keeping to the ratio itself.
Budget = Literal["shared", "even", "module"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class BitClass(Strict):
    """A run of directions with the same widths of V and U, stored next to one another."""

    v_bits: Bits
    u_bits: Bits
    directions: Annotated[int, Field(ge=1)]


class Factors(Strict):
    """A delta dW[rows, cols] stored as quantized singular directions."""

    kind: Literal["factors"] = "factors"
    shape: MatrixShape
    classes: list[BitClass]
    row_scale: bool = False
    report: dict[str, float | int | str | None] = {}


class Matrix(Strict):
    """A delta dW[rows, cols] stored as one matrix of codes, without SVD."""

    kind: Literal["matrix"] = "matrix"
    shape: MatrixShape
    bits: Bits
    report: dict[str, float | int | str | None] = {}


class Exact(Strict):
    """The fine-tuned tensor itself (norm weights, biases), in its own dtype."""

    kind: Literal["exact"] = "exact"
    shape: Shape
    dtype: Literal["float32", "bfloat16", "float16"]


Module = Annotated[Factors | Matrix | Exact, Field(discriminator="kind")]


class Base(Strict):
    """The base model that the delta belongs to; digests as in docs/format.md, section "Base digests"."""

    name: str
    content_digest: str
    sample_digest: str
    parameters: Annotated[int, Field(ge=1)]


class Calibration(Strict):
    source: str
    sha256: str
    samples: int
    tokens: int
    sequence_length: int
    seed: int


class Settings(Strict):
    """What the delta was made with."""

    method: str
    options: dict[str, bool | int | float | str | list[int] | None]  # the method's own
    ratio: float | None  # None: the size follows from the options
    budget: Budget = "module"
    compensated: bool = False  # each matrix was fitted to the compressed layers before it
    embedding_ratio: float


class Distillation(Strict):
    """Training of the scales; mean KL divergence to the fine-tune, nats per token of held-out samples."""

    steps: Annotated[int, Field(ge=1)]
    best_step: Annotated[int, Field(ge=0)]  # whose scales these are; 0: no step was better than none
    kl_before: float
    kl_after: float


class Weights(Strict):
    """delta.safetensors: its size in bytes and the XXH3-128 of its bytes, checked at each load."""

    bytes: Annotated[int, Field(ge=8)]
    xxh3_128: str


class DeltaConfig(Strict):
    """The whole of prinmix_config.json but its own checksum."""

    format_version: Literal[1] = FORMAT_VERSION
    tool: str
    base: Base
    finetuned: str
    settings: Settings
    calibration: Calibration | None
    distillation: Distillation | None = None
    modules: dict[str, Module]
    unchanged: list[str]
    weights: Weights
