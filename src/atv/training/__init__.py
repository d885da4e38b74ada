"""The training loop: `loop` runs it, `trainer` does the steps, `record` and `saving` write what is kept."""
