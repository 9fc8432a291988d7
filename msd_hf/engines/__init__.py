"""The same draft in other engines and harnesses; a folder for each."""
