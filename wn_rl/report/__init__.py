"""What comes out of runs: tables, curves and films."""
