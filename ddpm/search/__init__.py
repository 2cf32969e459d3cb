"""A search: its event log, trials, evaluator and leaderboard. The Ray Tune side is in tune/."""
