"""`python -m casa`: the program, where its script is not on the path."""

from casa.cli.main import run

if __name__ == "__main__":
    run()
