"""Updates by C kernels on a CPU: forward pass, TD loss, backward pass and Adamax step of the Q-network in one call."""
