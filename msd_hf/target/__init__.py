"""What is asked of a target: prefill, verification, hidden states, whether it can be served."""
