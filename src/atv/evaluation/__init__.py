"""Run a method, score its answers, record rows. Import the modules separately: records and metrics need no torch."""
