"""Several processes: how they start, agree, wait for each other, and end. See README.md."""
