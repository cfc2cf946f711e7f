"""`python -m elute`: the command line where its script is not on the path."""

from elute.cli import main

if __name__ == "__main__":
    main()
