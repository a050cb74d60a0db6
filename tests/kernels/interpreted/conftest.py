"""Only for processes started with TRITON_INTERPRET=1: Triton decides at import (see ../test_triton.py)."""

import os

collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["test_*.py"]
