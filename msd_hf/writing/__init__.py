"""What is written to disk or leaves the machine: whole files, folders that may be replaced, no secrets."""
