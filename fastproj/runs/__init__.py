"""The folder of a run: its journal, its checkpoints, its environment."""
