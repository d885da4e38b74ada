"""The paper, reproduced: its tasks, protocol, experiments, tables, theorems, and the analysis of vectors."""
