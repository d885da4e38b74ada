"""The one training loop, and the batches that it is fed."""
