"""The contestants that ours is measured beside, each as its documentation advises."""
