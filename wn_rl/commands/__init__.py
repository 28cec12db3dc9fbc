"""The commands ``train`` and ``evaluate``: what the scripts of the checkout and ``wn-rl`` run."""
