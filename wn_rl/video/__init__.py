"""Videos of episodes: rendered again in colour, with the Q-values beside the screen, as MP4 or GIF.

- ``recorded_episodes``: an episode of an evaluation or of the training as a seed and actions
- ``episode_video``: the frames of a video, and the commands; ``q_value_panel`` and ``saliency``: what they show
- ``writer``: the MP4 or GIF file
"""
