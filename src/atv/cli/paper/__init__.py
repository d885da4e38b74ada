"""Implementation of `atv paper ...`."""
