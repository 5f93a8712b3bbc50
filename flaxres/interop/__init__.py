"""Weights and functions in and out of other frameworks."""
