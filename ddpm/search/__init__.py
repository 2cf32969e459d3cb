"""A search: its trials, who judges them, and how it ended. What Ray Tune does of it is in tune/."""
