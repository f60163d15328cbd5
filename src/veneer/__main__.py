"""`python -m veneer` is `veneer`."""

from veneer.cli import main

if __name__ == "__main__":  # and not in processes that it starts
    main()
