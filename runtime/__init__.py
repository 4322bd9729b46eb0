"""What keeps a run alive: processes, data lists, checkpoints, logs. The method is one folder up."""
