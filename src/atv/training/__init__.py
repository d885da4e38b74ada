"""The training loop and its batches."""
