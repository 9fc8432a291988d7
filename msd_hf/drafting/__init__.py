"""From hidden states of the target to a candidate tree."""
