"""What every layer uses: seeds and random generators."""
