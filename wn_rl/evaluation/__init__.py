"""Playing trained networks under a stated protocol: episodes, scores, statistics, export."""
