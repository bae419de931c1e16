"""``python -m rlvr_fast``, which is ``rlvr-fast``."""

from rlvr_fast.cli import app

if __name__ == "__main__":
    app(prog_name="python -m rlvr_fast")
