"""Videos of episodes: played again in colour, with the Q-values beside the screen, as MP4 or GIF."""
