"""Access to the inside of a frozen LLM: only this package knows what a decoder layer or a cache looks like."""
