"""`python -m msd_hf` is `msd-hf`."""

from .cli import main


main()
