"""`python -m benchmarks` measures everything; with options it is `python -m benchmarks.run`."""

import sys

from benchmarks.run import app

if __name__ == "__main__":
    app(sys.argv[1:] or ["--all"])
