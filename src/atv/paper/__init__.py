"""Reproduction of the paper: its tasks, protocol, experiments, tables, theorems, and the analysis of vectors."""
