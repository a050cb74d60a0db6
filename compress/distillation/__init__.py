"""Training the scales of a finished delta so that the whole model answers as the fine-tune does."""
