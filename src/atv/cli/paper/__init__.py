"""The work behind `atv paper ...`."""
