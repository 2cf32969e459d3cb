"""A search: its space, trials on Ray Tune, event log, evaluator and leaderboard."""
