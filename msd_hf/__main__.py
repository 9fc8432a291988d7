"""`python -m msd_hf` runs the command `msd-hf`."""

from .cli import main


main()
