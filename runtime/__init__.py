"""What keeps a run alive: its processes, its checkpoints, its life. The method is in the files above."""
