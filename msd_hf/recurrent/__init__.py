"""Recurrent and convolutional layers over a candidate tree: one forward, without a state for each node."""
