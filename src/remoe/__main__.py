"""`python -m remoe` is the command `remoe`."""

from remoe.cli import main

if __name__ == "__main__":
    main()
