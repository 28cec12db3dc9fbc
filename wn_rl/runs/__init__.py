"""What a run writes and reads back: its directory and its checkpoints; no file that is read can execute code."""
