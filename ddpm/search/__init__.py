"""A search: its space, its trials on Ray Tune, and its leaderboard."""
