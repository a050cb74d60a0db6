"""The demo's tasks for lm-evaluation-harness (`--include_path`): a YAML file and its questions each."""
