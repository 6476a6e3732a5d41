"""`python -m fopd_cli` is the `fopd` command."""

from fopd_cli.cli import main

if __name__ == "__main__":
    main()
