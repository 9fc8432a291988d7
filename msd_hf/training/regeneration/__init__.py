"""Data sets whose answers the target writes itself."""
