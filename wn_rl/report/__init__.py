"""What comes out of runs: tables and curves."""
