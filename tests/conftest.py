"""Options of the whole suite."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--reuse-demo",
        action="store_true",
        help="Take the models and deltas of the last `make demo` as they are, instead of running it first.",
    )
