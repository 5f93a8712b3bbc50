"""Measurements of networks."""
