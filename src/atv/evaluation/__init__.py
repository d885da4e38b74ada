"""Run a method, score its answers, record every row. Import the modules separately: records and metrics need no
torch."""
