"""Ask a method, score its answers, record every row. Imported piece by piece: records and metrics need no torch."""
