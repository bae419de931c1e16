"""``python -m rlvr_fast.simulate``."""

from rlvr_fast.simulate.commands import app

if __name__ == "__main__":
    app(prog_name="python -m rlvr_fast.simulate")
