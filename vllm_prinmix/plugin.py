"""vLLM's entry point (group vllm.general_plugins): runs once in each of vLLM's processes.

It must be cheap, must never raise, and must change nothing for a server started without PrinMix.
"""

from __future__ import annotations

import logging

_registered = False


def register() -> None:
    """Install the hooks; a second call does nothing."""
    global _registered
    if _registered:
        return
    _registered = True
    try:
        from vllm_prinmix import hooks

        hooks.install()
    except Exception:
        # An exception here would end every vLLM process of this environment, PrinMix wanted or not. The
        # options are then missing, so that asking for PrinMix still fails, with argparse's own message.
        logging.getLogger("vllm.prinmix").warning(
            "vllm-prinmix could not hook into this vLLM and stays off", exc_info=True
        )
