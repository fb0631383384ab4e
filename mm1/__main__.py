"""Run the command `mm1` as `python -m mm1`."""

from mm1.cli import main

if __name__ == "__main__":
    main()
