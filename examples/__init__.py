"""Examples: data sets, and for each one the commands that train on it and measure the result (docs/examples.md)."""
