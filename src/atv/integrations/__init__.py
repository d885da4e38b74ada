"""Other libraries that use a steered LLM: each file is one of them and needs its own extra."""
