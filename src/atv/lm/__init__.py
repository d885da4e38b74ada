"""Reaching into a frozen LLM: nothing outside this room knows what a decoder layer or a cache looks like."""
