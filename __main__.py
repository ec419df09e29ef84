"""`python -m nanophi` and `accelerate launch -m nanophi`: the same as the `nanophi` command."""

from nanophi.cli import main

if __name__ == "__main__":
    main()
