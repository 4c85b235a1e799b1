"""`python -m restow`: the same as the command `restow`."""

from restow.cli import main

if __name__ == "__main__":
    main()
