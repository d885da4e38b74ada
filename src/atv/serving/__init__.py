"""Serving adapters: one frozen LLM, and vectors of its own for every request."""
