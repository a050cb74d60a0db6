"""`python -m benchmarks.quality`: the paper's quality tables from any pair of base and fine-tune."""
