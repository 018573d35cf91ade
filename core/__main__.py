"""`python -m loopctl`, which is `loopctl`."""
from loopctl.cli import main

if __name__ == "__main__":
    main(prog_name="loopctl")
