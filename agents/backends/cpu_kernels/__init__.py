"""Forward and backward pass, loss and optimizer step in C, on packed copies of the weights."""
