"""`python -m loradeploy` is the command line."""

from loradeploy.cli.main import main

if __name__ == "__main__":
    main()
