"""Ask a method, score its answers, record every row. Imported piece by piece: records need no torch."""
