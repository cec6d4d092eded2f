"""Double-blind annotation: tasks for several annotators, how far they agree, and one label per image."""
