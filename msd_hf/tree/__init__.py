"""Candidate trees: their settings, growth and size."""
