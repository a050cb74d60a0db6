"""Trained pairs of base and fine-tune that are hard to compress, each for another reason (`recipes`)."""
