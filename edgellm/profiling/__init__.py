"""How fast artifacts answer here: cells measured in rounds, each in a process of its own."""
