"""Answers that the target writes itself."""
